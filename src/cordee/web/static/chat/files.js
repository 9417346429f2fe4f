/**
 * Files as text, turned into it in this browser: no part of a file goes anywhere but as text of a question, to the
 * machine that the page came from. What reads docx and pdf is loaded when the first such file comes.
 */
import { moduleUrl, parseXml } from "../shell/trusted.js";

/** What a browser reads at once without trouble. */
const FILE_BYTES_MAX = 30_000_000;
/** More text than the longest context takes. */
const TEXT_CHARS_MAX = 2_000_000;
const PAGES_MAX = 1000;
/** Characters that no text has. */
const CONTROL = /[\u0000-\u0008\u000E-\u001A\u001C-\u001F]/;

export class FileFault extends Error {
  /** @param {"too_large" | "unknown" | "damaged" | "locked" | "empty"} code */
  constructor(code) {
    super(code);
    this.code = code;
  }
}

/**
 * The text of a file. Throws a FileFault.
 * @param {File} file
 * @returns {Promise<import("./conversations.js").Attached>}
 */
export async function readFile(file) {
  if (file.size > FILE_BYTES_MAX) throw new FileFault("too_large");
  const data = new Uint8Array(await file.arrayBuffer());
  const read = hasMark(data, "%PDF-") ? fromPdf : hasMark(data, "PK") ? fromDocx : fromText;
  const text = (await read(data)).replace(/\r\n?/g, "\n").trim();
  if (!text) throw new FileFault("empty");
  if (text.length > TEXT_CHARS_MAX) throw new FileFault("too_large");
  return { name: file.name, text };
}

/** @param {Uint8Array} data @param {string} mark */
function hasMark(data, mark) {
  return [...mark].every((each, at) => data[at] === each.charCodeAt(0));
}

/**
 * Text in UTF-8 or UTF-16; or as Windows writes it, where it is neither.
 * @param {Uint8Array} data
 */
function fromText(data) {
  const wide = (data[0] === 0xff && data[1] === 0xfe && "utf-16le") || (data[0] === 0xfe && data[1] === 0xff && "utf-16be");
  for (const encoding of wide ? [wide] : ["utf-8", "windows-1252"]) {
    try {
      const text = new TextDecoder(encoding, { fatal: true }).decode(data);
      if (!CONTROL.test(text)) return text;
    } catch {
      // The next encoding may be the one.
    }
  }
  throw new FileFault("unknown");
}

/**
 * The paragraphs and tables of a docx: WordprocessingML in a zip (ECMA-376).
 * @param {Uint8Array} data
 */
async function fromDocx(data) {
  const { unzipSync } = await import("../vendor/fflate.js");
  let found;
  try {
    found = unzipSync(data, {
      filter: ({ name, originalSize }) => name === "word/document.xml" && originalSize <= FILE_BYTES_MAX,
    })["word/document.xml"];
  } catch {
    throw new FileFault("damaged");
  }
  if (!found) throw new FileFault("unknown");
  const text = new TextDecoder().decode(found);
  if (text.includes("<!DOCTYPE")) throw new FileFault("damaged"); // Word writes none; entities may be a trap
  const body = parseXml(text).getElementsByTagNameNS("*", "body")[0];
  if (!body) throw new FileFault("damaged");
  return [...body.children].map(wordBlock).join("\n\n");
}

/**
 * @param {Element} block
 * @returns {string}
 */
function wordBlock(block) {
  if (block.localName === "tbl") {
    const rows = [...block.children].filter((each) => each.localName === "tr");
    return rows.map((row) => [...row.children].filter((each) => each.localName === "tc").map(wordCell).join(" | ")).join("\n");
  }
  return wordRun(block);
}

/** @param {Element} cell */
function wordCell(cell) {
  return [...cell.children].map(wordBlock).filter(Boolean).join(" ");
}

/**
 * @param {Element} element
 * @returns {string}
 */
function wordRun(element) {
  switch (element.localName) {
    case "t":
      return element.textContent ?? "";
    case "tab":
      return "\t";
    case "br":
    case "cr":
      return "\n";
    case "pPr":
    case "rPr":
    case "delText":
    case "instrText":
      return "";
    default:
      return [...element.children].map(wordRun).join("");
  }
}

/**
 * The text of a PDF's pages, by pdf.js in a worker of its own.
 * @param {Uint8Array} data
 */
async function fromPdf(data) {
  const pdf = await import("../vendor/pdf.mjs");
  const worker = new Worker(moduleUrl("vendor/pdf.worker.mjs"), { type: "module" });
  pdf.GlobalWorkerOptions.workerPort = worker;
  const loading = pdf.getDocument({ data, isEvalSupported: false, disableFontFace: true, useWasm: false, verbosity: 0 });
  try {
    const document = await loading.promise;
    const pages = [];
    for (let number = 1; number <= Math.min(document.numPages, PAGES_MAX); number += 1) {
      const page = await document.getPage(number);
      const { items } = await page.getTextContent();
      pages.push(items.map(({ str, hasEOL }) => (str ?? "") + (hasEOL ? "\n" : "")).join(""));
      page.cleanup();
    }
    return pages.join("\n\n");
  } catch (error) {
    throw new FileFault(/** @type {any} */ (error)?.name === "PasswordException" ? "locked" : "damaged");
  } finally {
    await loading.destroy();
    worker.terminate();
  }
}
