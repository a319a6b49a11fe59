/* Connection: whether the service answers, told to whoever listens; finds by itself when it is back. */

const BEAT = 8000;
const WAITS = [1000, 1500, 2500, 4000, 5000];

class Connection extends EventTarget {
  gone = false;
  #tries = 0;
  #timer = 0;

  /** Looks every few seconds while the page is seen, so that an idle reader learns of it too. */
  watch() {
    setInterval(
      () => this.gone || document.hidden || this.#ready().then((ok) => ok || this.lost()),
      BEAT,
    );
    addEventListener("online", () => this.gone && this.retry());
    addEventListener("offline", () => this.lost());
    document.addEventListener(
      "visibilitychange",
      () => this.gone && !document.hidden && this.retry(),
    );
  }

  lost() {
    if (this.gone) return;
    this.gone = true;
    this.#tries = 0;
    this.dispatchEvent(new Event("lost"));
    this.#later();
  }

  /** Asks now; true: the service is back. */
  async retry() {
    clearTimeout(this.#timer);
    const ok = await this.#ready();
    if (ok && this.gone) {
      this.gone = false;
      this.dispatchEvent(new Event("back"));
    } else if (!ok) this.#later();
    return ok;
  }

  #later() {
    clearTimeout(this.#timer);
    const wait = WAITS[Math.min(this.#tries++, WAITS.length - 1)];
    this.#timer = setTimeout(() => this.retry(), wait);
  }

  async #ready() {
    try {
      return (await fetch("/readyz", { cache: "no-store", signal: AbortSignal.timeout(4000) })).ok;
    } catch {
      return false;
    }
  }
}

export const connection = new Connection();
