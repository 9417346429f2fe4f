/**
 * An answer that grows on the screen. Theory of operation: a text is drawn block by block. What stands before the
 * last block can no longer change, so it is drawn once and left alone; only the last block is drawn again, at most
 * once a frame and so seldom that drawing takes a small part of the time. Code and very long lines are not read
 * again at all: what comes is added to them.
 */
import { colour, furnish } from "./code.js";
import { blocks, drawn, readable } from "./markdown.js";

/** As much as is read at a time: some milliseconds. A longer block is shown as plain text. */
const READ_CHARS_MAX = 12_000;
/** For which finished blocks are drawn in one frame; then the browser has its turn. */
const FRAME_MS = 12;
/** Drawing the last block anew takes this part of the time at most. */
const SHARE = 5;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*\n/;
const BLANK = /^(?:[ \t]*\n)+/;
/** Links that are defined at the end of a text change what was drawn. */
const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m;

export class GrowingText {
  /** @param {HTMLElement} element gets the text */
  constructor(element) {
    this.element = element;
    this.text = "";
    this.done = 0; // characters that are drawn for good
    this.isWhole = false;
    /** @type {ChildNode[]} the last block, which is drawn again */
    this.last = [];
    /** @type {{code: HTMLElement, language: string, end: RegExp} | null} a block of code that goes on */
    this.code = null;
    this.frame = 0;
    this.notBefore = 0;
    /** @type {() => void} called after something was drawn */
    this.onDrawn = () => {};
  }

  /**
   * @param {string} text all of it, of which the beginning was told before
   * @param {boolean} isWhole nothing will follow
   */
  update(text, isWhole) {
    if (!text.startsWith(this.text) || (isWhole && !this.isWhole && this.done > 0 && DEFINITION.test(text))) {
      this.begin();
    }
    this.text = text;
    this.isWhole = isWhole;
    this.schedule();
  }

  begin() {
    this.element.replaceChildren();
    this.done = 0;
    this.last = [];
    this.code = null;
  }

  stop() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
  }

  schedule() {
    if (this.frame !== 0) return;
    this.frame = requestAnimationFrame((now) => {
      this.frame = 0;
      if (now < this.notBefore && !this.isWhole) {
        this.schedule();
        return;
      }
      const began = performance.now();
      const isAll = this.draw(began + FRAME_MS);
      this.notBefore = performance.now() + SHARE * (performance.now() - began);
      this.onDrawn();
      if (!isAll) this.schedule();
    });
  }

  /**
   * Draw what is new, until a time; whether that was all.
   * @param {number} until
   */
  draw(until) {
    while (this.done < this.text.length) {
      if (performance.now() > until) return false;
      if (this.code !== null) {
        if (!this.drawCode(this.code)) return true;
      } else if (!this.drawBlocks(until)) {
        return true;
      }
    }
    return true;
  }

  /**
   * Add lines to the code that goes on; whether it has ended.
   * @param {{code: HTMLElement, language: string, end: RegExp}} open
   */
  drawCode(open) {
    const rest = this.text.slice(this.done);
    const end = open.end.exec(rest);
    // Without its end, a last line may yet become the closing fence.
    const line = rest.lastIndexOf("\n") + 1;
    const length = end ? end.index : this.isWhole ? rest.length : line;
    if (length > 0) open.code.append(readable(rest.slice(0, length)));
    this.done += end ? end.index + end[0].length : length;
    if (end === null && !this.isWhole) return false;
    void colour(open.code, open.language);
    this.code = null;
    return true;
  }

  /**
   * Draw blocks for good, and the last one for now; whether there may be more to draw.
   * @param {number} until
   */
  drawBlocks(until) {
    const base = this.done;
    const rest = this.text.slice(base, base + READ_CHARS_MAX);
    const isAll = base + rest.length === this.text.length;
    const blank = BLANK.exec(rest);
    const fence = FENCE.exec(rest);
    if (blank || fence) {
      this.forget();
      if (fence) this.beginCode(fence);
      else this.done += blank?.[0].length ?? 0;
      return true;
    }
    const found = blocks(rest);
    const lines = lineStarts(rest);
    this.forget();
    const last = found[isAll && this.isWhole ? found.length : found.length - 1];
    for (const [at, block] of found.entries()) {
      if (block === last) break;
      const next = found[at + 1];
      this.drawForGood(block);
      this.done = base + (next ? (lines[next.first] ?? 0) : rest.length);
      const nextBegins = this.text.slice(this.done, this.done + 100);
      if (performance.now() > until || FENCE.test(nextBegins)) return true;
    }
    if (last === undefined) {
      // All is drawn; or there is nothing to see, such as the definition of a link.
      if (isAll && !this.isWhole) return false;
      this.done = base + rest.length;
      return true;
    }
    if (!isAll) {
      if (this.done === base) this.drawLong(rest);
      return true;
    }
    const fragment = drawn(last);
    this.last = [...fragment.childNodes];
    this.element.append(fragment);
    return false;
  }

  /** @param {import("./markdown.js").Block} block */
  drawForGood(block) {
    const fragment = drawn(block);
    const codes = [...fragment.querySelectorAll("pre > code")];
    this.element.append(fragment);
    for (const code of codes) {
      const language = /^language-(\S+)$/.exec(code.className)?.[1] ?? "";
      furnish(/** @type {HTMLElement} */ (code.parentElement), language);
      void colour(/** @type {HTMLElement} */ (code), language);
    }
  }

  forget() {
    for (const node of this.last) node.remove();
    this.last = [];
  }

  /** @param {RegExpExecArray} fence */
  beginCode(fence) {
    this.forget();
    const pre = document.createElement("pre");
    const code = document.createElement("code");
    pre.append(code);
    this.element.append(pre);
    const language = fence[2] ?? "";
    furnish(pre, language);
    const mark = fence[1] ?? "```";
    const end = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*(?:\\n|$)`, "m");
    this.code = { code, language, end };
    this.done += fence[0].length;
  }

  /**
   * A part of a block that is too long to be read.
   * @param {string} text
   */
  drawLong(text) {
    const part = document.createElement("div");
    part.className = "long";
    part.dir = "auto";
    part.textContent = readable(text);
    this.element.append(part);
    this.done += text.length;
  }
}

/**
 * Where each line of a text begins.
 * @param {string} text
 */
function lineStarts(text) {
  const starts = [0];
  for (let at = text.indexOf("\n"); at !== -1; at = text.indexOf("\n", at + 1)) starts.push(at + 1);
  return starts;
}
