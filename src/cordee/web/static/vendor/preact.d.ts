// What the page uses of preact and htm, for the type checker.
export function h(kind: any, props?: any, ...children: any[]): any;
export function render(node: any, parent: Element): void;
export const Fragment: any;
export function html(strings: TemplateStringsArray, ...values: any[]): any;
export function useState<T>(first: T | (() => T)): [T, (next: T | ((old: T) => T)) => void];
export function useRef<T>(first: T): { current: T };
export function useEffect(effect: () => void | (() => void), inputs?: any[]): void;
export function useLayoutEffect(effect: () => void | (() => void), inputs?: any[]): void;
export function useMemo<T>(make: () => T, inputs: any[]): T;
export function useCallback<T>(callback: T, inputs: any[]): T;
export function useId(): string;
