/** Where machines stand on the map; pure. All lengths are in the units of the drawing, which are CSS pixels. */

const CARD = 216;
const GAP = 56;
const HEAD = 74;
const ROW = 21;
const MARGIN = 12;
const ARC = 54; // beside a single column, for the links
const ROUND_MAX = 8; // so many stand in a round, where there is room

/** @typedef {{x: number, y: number, width: number, height: number}} Box */

/** @param {number} rows of stages */
export function cardHeight(rows) {
  return HEAD + ROW * rows;
}

/**
 * A box for each card, and the height of all; `isColumn`: they stand below each other.
 * @param {number[]} rows of stages, for each machine
 * @param {number} width
 * @returns {{boxes: Box[], height: number, isColumn: boolean}}
 */
export function arrange(rows, width) {
  const heights = rows.map(cardHeight);
  if (width < 2 * CARD + GAP + 2 * MARGIN) return column(heights, width);
  if (rows.length <= ROUND_MAX && width >= 640) return round(heights, width);
  return grid(heights, width);
}

/** @param {number[]} heights @param {number} width */
function column(heights, width) {
  let y = MARGIN;
  const room = width - 2 * MARGIN - (heights.length > 1 ? ARC : 0);
  const boxes = heights.map((height) => {
    const box = { x: MARGIN, y, width: room, height };
    y += height + MARGIN * 1.5;
    return box;
  });
  return { boxes, height: y, isColumn: true };
}

/** @param {number[]} heights @param {number} width */
function round(heights, width) {
  const count = heights.length;
  const tallest = Math.max(...heights);
  const across = (width - CARD) / 2 - MARGIN;
  const down = count <= 2 ? 0 : Math.max(tallest * 0.75, 40 * count);
  const first = count === 2 ? Math.PI : -Math.PI / 2;
  const middle = { x: width / 2, y: MARGIN + tallest / 2 + down };
  const boxes = heights.map((height, index) => {
    const angle = first + (2 * Math.PI * index) / count;
    const reach = count === 1 ? 0 : Math.min(across, 330);
    const x = middle.x + reach * Math.cos(angle) - CARD / 2;
    const y = middle.y + down * Math.sin(angle) - height / 2;
    return { x, y, width: CARD, height };
  });
  const bottom = Math.max(...boxes.map((box) => box.y + box.height));
  return { boxes, height: bottom + MARGIN, isColumn: false };
}

/** @param {number[]} heights @param {number} width */
function grid(heights, width) {
  const columns = Math.max(1, Math.floor((width - 2 * MARGIN + GAP) / (CARD + GAP)));
  const tallest = Math.max(0, ...heights);
  const boxes = heights.map((height, index) => ({
    x: MARGIN + (index % columns) * (CARD + GAP),
    y: MARGIN + Math.floor(index / columns) * (tallest + GAP),
    width: CARD,
    height,
  }));
  const rows = Math.ceil(heights.length / columns);
  return { boxes, height: MARGIN + rows * (tallest + GAP), isColumn: false };
}

/**
 * The way from one card to another; with `aside` it leaves room for the way back.
 * @param {Box} from
 * @param {Box} to
 * @param {boolean} isColumn
 * @param {number} aside
 * @returns {{path: string, middle: {x: number, y: number}}}
 */
export function way(from, to, isColumn, aside = 0) {
  const a = centre(from);
  const b = centre(to);
  if (isColumn) {
    const x = from.x + from.width;
    const out = x + Math.min(ARC - 6, 18 + Math.abs(a.y - b.y) / 12) + aside;
    const path = `M ${x} ${a.y + aside} C ${out} ${a.y + aside} ${out} ${b.y + aside} ${x} ${b.y + aside}`;
    return { path, middle: { x: x + (out - x) * 0.75, y: (a.y + b.y) / 2 } };
  }
  const length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
  const [dx, dy] = [(-(b.y - a.y) / length) * aside, ((b.x - a.x) / length) * aside];
  return {
    path: `M ${a.x + dx} ${a.y + dy} L ${b.x + dx} ${b.y + dy}`,
    middle: { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 },
  };
}

/** @param {Box} box */
function centre(box) {
  return { x: box.x + box.width / 2, y: box.y + box.height / 2 };
}
