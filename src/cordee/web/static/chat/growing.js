/**
 * An answer that grows on the screen. Theory of operation: a text is drawn block by block. What stands before the
 * last block can no longer change, so it is drawn once and left alone; only the last block is drawn again, at most
 * once a frame and so seldom that drawing takes a small part of the time. Of a table or a list that goes on, only
 * the last row or item is drawn again. Code and very long lines are not read again at all: what comes is added to them.
 */
import { colour, furnish } from "./code.js";
import { blocks, drawn, readable } from "./markdown.js";
import { divided, drawnParts, joined } from "./parts.js";

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

/** @typedef {import("./markdown.js").Block} Block */

/** The blocks of a text that may go on. The last line may become anything, and with it what stands before it. */
class Read {
  /**
   * @param {string} text
   * @param {boolean} isWhole nothing will follow
   */
  constructor(text, isWhole) {
    this.text = text;
    this.found = blocks(text);
    this.starts = [0];
    for (let at = text.indexOf("\n"); at !== -1; at = text.indexOf("\n", at + 1)) this.starts.push(at + 1);
    this.lastLine = isWhole ? this.starts.length : this.starts.length - 1;
    /** How many blocks are there for good. */
    this.sure = isWhole ? this.found.length : Math.max(0, this.found.length - (this.isSure(this.found.at(-1)) ? 1 : 2));
  }

  /** Whether a block or part is known to begin where it seems to. @param {Block | undefined} block */
  isSure(block) {
    return block !== undefined && block.first < this.lastLine;
  }

  /** Where a line begins. @param {number} line */
  start(line) {
    return this.starts[line] ?? this.text.length;
  }

  /** The text of lines. @param {number} first @param {number} end */
  lines(first, end) {
    return this.text.slice(this.start(first), this.start(end));
  }
}

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
    /** @type {{element: HTMLElement, head: string} | null} a table or a list that goes on: see parts.js */
    this.parted = null;
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
    this.parted = null;
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
    const blank = this.parted ? null : BLANK.exec(rest);
    const fence = this.parted ? null : FENCE.exec(rest);
    this.forget();
    if (blank || fence) {
      if (fence) this.beginCode(fence);
      else this.done += blank?.[0].length ?? 0;
      return true;
    }
    const head = this.parted?.head ?? "";
    const read = new Read(head + rest, isAll && this.isWhole);
    /** @param {number} line */
    const place = (line) => base + read.start(line) - head.length;
    for (const [at, block] of read.found.slice(0, read.sure).entries()) {
      const next = read.found[at + 1];
      this.drawForGood(block);
      this.done = next ? place(next.first) : base + rest.length;
      const nextBegins = this.text.slice(this.done, this.done + 100);
      if (performance.now() > until || FENCE.test(nextBegins)) return true;
    }
    const [last, ...unsure] = read.found.slice(read.sure);
    if (last === undefined) {
      // All is drawn; or there is nothing to see, such as the definition of a link.
      if (isAll && !this.isWhole) return false;
      this.done = base + rest.length;
      return true;
    }
    const part = this.drawParts(last, read);
    if (part) this.done = place(part.first);
    if (!isAll && this.done === base && unsure[0]) {
      this.drawForGood(last);
      this.done = place(unsure[0].first);
    } else if (!isAll && this.done === base) {
      this.drawLong(rest);
    }
    if (!isAll) return true;
    this.drawForNow(part ?? last);
    for (const block of unsure) this.append(drawn(block));
    return false;
  }

  /**
   * Draw what can no longer change of a table or a list that goes on; what is left of it, if anything was drawn.
   * @param {Block} block
   * @param {Read} read
   * @returns {Block | null}
   */
  drawParts(block, read) {
    const whole = divided(block);
    if (whole === null) return null;
    const { parts } = whole;
    const first = parts[0];
    const left = parts.splice(read.isSure(parts[parts.length - 1]) ? -1 : -2);
    if (!first || !left[0] || parts.length === 0) return null;
    const head = this.parted?.head ?? (block.tokens[0]?.type === "table_open" ? read.lines(block.first, first.first) : "");
    const element = this.drawForGood(joined(whole, parts));
    this.parted = { element, head };
    return { ...joined(whole, left), first: left[0].first };
  }

  /**
   * Draw a block that will not change, or what is left of the one that went on; where its parts stand.
   * @param {Block} block
   * @returns {HTMLElement}
   */
  drawForGood(block) {
    const fragment = drawn(block);
    const codes = [...fragment.querySelectorAll("pre > code")];
    let { element, parts } = drawnParts(fragment);
    if (this.parted) {
      element = this.parted.element;
      element.append(...parts);
    } else {
      this.element.append(fragment);
    }
    this.parted = null;
    for (const code of codes) {
      const language = /^language-(\S+)$/.exec(code.className)?.[1] ?? "";
      furnish(/** @type {HTMLElement} */ (code.parentElement), language);
      void colour(/** @type {HTMLElement} */ (code), language);
    }
    return element;
  }

  /** @param {Block} block */
  drawForNow(block) {
    const fragment = drawn(block);
    if (!this.parted) {
      this.append(fragment);
      return;
    }
    const { parts } = drawnParts(fragment);
    this.last.push(...parts);
    this.parted.element.append(...parts);
  }

  /** @param {DocumentFragment} fragment to be drawn again */
  append(fragment) {
    this.last.push(...fragment.childNodes);
    this.element.append(fragment);
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
    this.parted = null;
    const part = document.createElement("div");
    part.className = "long";
    part.dir = "auto";
    part.textContent = readable(text);
    this.element.append(part);
    this.done += text.length;
  }
}
