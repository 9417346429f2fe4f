// What the page uses of fflate, for the type checker.
export function unzipSync(
  data: Uint8Array,
  options: { filter(file: { name: string; originalSize: number }): boolean },
): Record<string, Uint8Array>;
