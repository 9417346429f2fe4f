// What the page uses of idb, for the type checker.
export interface Database {
  getAll(store: string): Promise<any[]>;
  get(store: string, key: string): Promise<any>;
  put(store: string, value: any): Promise<any>;
  delete(store: string, key: string): Promise<void>;
  clear(store: string): Promise<void>;
}
export function openDB(
  name: string,
  version: number,
  options: { upgrade(database: IDBDatabase): void },
): Promise<Database>;
