// Messages, topics, and delivery until the server's receipt: docs/protocol.md, sections 3 and 4.
import { setTimeout as sleep } from "node:timers/promises";
import { decode as unpack, encode as pack } from "@msgpack/msgpack";

const CHUNK_BYTES = 120 * 1024;
const WINDOW = 8;
const RECEIPT_TIMEOUT_MS = 10_000;

export const encode = (type, fields) => Buffer.from(pack({ v: 2, t: type, ...fields }));

/** The message in `data`; throws on what is none of ours. */
export function decode(data) {
  const message = unpack(data, { maxExtLength: 0 });
  if (message?.v !== 2) throw new Error("expected wire version 2");
  return message;
}

export function topicsOf(federation, device) {
  const root = `fl/v1/${federation}`;
  return {
    down: `${root}/down/${device}/+`,
    request: `${root}/req/${device}`,
    status: `${root}/dev/${device}/status`,
    up: (block) => `${root}/blocks/${block}/up/${device}`,
  };
}

/** In ms: from 0.5 s to 30 s, each times a random factor in [0.5, 1.5]. */
export function* pauses() {
  for (let pause = 500; ; pause = Math.min(2 * pause, 30_000)) yield pause * (0.5 + Math.random());
}

/** Delivers updates and reports; `publish(topic, bytes)` resolves when the broker has them. */
export class Uplink {
  #waiting = new Map(); // what a receipt resolves, by update_id

  constructor(publish, topics) {
    Object.assign(this, { publish, topics });
  }

  receive(receipt) {
    this.#waiting.get(keyOf(receipt))?.(receipt);
  }

  /** Sends an update with its payload, or a report; the receipt that accepts or rejects it. */
  async deliver({ message, payload }) {
    const { update_id, block } = decode(message);
    const chunks = [];
    for (let at = 0; at < payload.length; at += CHUNK_BYTES) {
      const data = payload.subarray(at, at + CHUNK_BYTES);
      chunks.push(encode("chunk", { update_id, index: chunks.length, data }));
    }
    let missing = chunks;
    for (const pause of pauses()) {
      const arrival = new Promise((resolve) => this.#waiting.set(keyOf({ update_id }), resolve));
      if (block) await this.#upload(this.topics.up(block), message, missing, update_id);
      else await this.publish(this.topics.request, message);
      const receipt = await Promise.race([arrival, sleep(RECEIPT_TIMEOUT_MS)]);
      if (receipt && receipt.status !== "missing") return receipt;
      const bits = receipt?.missing ?? [];
      if (!bits.length) await sleep(pause);
      if (!receipt) missing = []; // ask what has arrived
      else if (!bits.length) missing = chunks; // the server knows nothing of it
      else missing = chunks.filter((_, i) => (bits[i >> 3] >> (i & 7)) & 1);
    }
  }

  async #upload(topic, message, chunks, update_id) {
    await this.publish(topic, message);
    for (let i = 0; i < chunks.length; i += WINDOW) {
      await Promise.all(chunks.slice(i, i + WINDOW).map((chunk) => this.publish(topic, chunk)));
    }
    await this.publish(topic, encode("fin", { update_id }));
  }
}

const keyOf = ({ update_id }) => Buffer.from(update_id).toString("hex");
