// What the page uses of pdf.js, for the type checker.
export const GlobalWorkerOptions: { workerPort: Worker | null };
export function getDocument(options: any): {
  promise: Promise<{
    numPages: number;
    getPage(number: number): Promise<{
      getTextContent(): Promise<{ items: { str?: string; hasEOL?: boolean }[] }>;
      cleanup(): void;
    }>;
  }>;
  destroy(): Promise<void>;
};
