/** A signal: `on` adds listeners, `emit` tells them. */
export function signal() {
  const listeners = [];
  return {
    on: (listener) => listeners.push(listener),
    emit: (...values) => listeners.forEach((listener) => listener(...values)),
  };
}
