// A device: node client.mjs --url URL --token T --data data.json --store DIR [--device NAME]
import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import { rmSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { decode as unpack, encode as pack } from "@msgpack/msgpack";
import { connectAsync } from "mqtt";
import {
  Engine, heldBlocks, parseManifest, read, sha256, toBytes, toTensors, toVector, write,
} from "./model.mjs";
import { Draws, train } from "./train.mjs";
import { Uplink, decode, encode, pauses, topicsOf } from "./wire.mjs";

const text = { type: "string" };
const { values: options } = parseArgs({
  options: { url: text, token: text, data: text, store: text, device: text, federation: text },
});
const { url, token, store = ".", federation = "default" } = options;
const root = `${url}/v1/${federation}`;
const stateFile = join(store, "state.msgpack");
const ownFile = join(store, "fine-tuned.msgpack");
const artifacts = join(store, "artifacts");

/** The body of an answer, of that sha256 if one is given; `body` is posted as JSON. */
async function request(path, authorization, { body, digest } = {}) {
  const answer = await fetch(`${root}/${path}`, {
    method: body ? "POST" : "GET",
    headers: { Authorization: authorization, "Content-Type": "application/json" },
    body: body && JSON.stringify(body),
    redirect: "error",
    signal: AbortSignal.timeout(30_000),
  });
  const data = Buffer.from(await answer.arrayBuffer());
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${data.toString().trim()}`);
  if (digest && sha256(data) !== digest) throw new Error(`${path}: wrong sha256`);
  return data;
}

/** Enrolls once in a store's life. */
async function identify(modalities) {
  const path = join(store, "identity.json");
  if (!read(path)) {
    const device = options.device ?? `node-${randomBytes(4).toString("hex")}`;
    write(path, await request("enroll", `Bearer ${token}`, { body: { device, modalities } }));
  }
  return JSON.parse(read(path));
}

/** Downloads what the device's blocks need and is not there yet. */
async function fetchArtifacts(manifest, held, isShared, login) {
  const files = Object.values(manifest.optimizers);
  for (const block of held) {
    const { parameters, ...graphs } = block.artifacts;
    files.push(...Object.values(graphs).filter(Boolean), ...(isShared(block) ? [] : [parameters]));
  }
  for (const file of files) {
    const [path, digest] = [join(artifacts, file.path), file.sha256];
    if (sha256(read(path) ?? "") === digest) continue;
    write(path, await request(`artifacts/${file.path}`, login, { digest }));
  }
}

async function main() {
  if (!url || !options.data || !options.store) throw new Error("--url, --data and --store are due");
  const examples = JSON.parse(read(options.data) ?? "{}");
  if (!examples.inputs || !examples.labels) throw new Error(`no examples in ${options.data}`);
  const modalities = Object.keys(examples.inputs);
  const identity = await identify(modalities);
  const { device, password, private_blocks: privateBlocks } = identity;
  if (identity.private_tensors) throw new Error("this client cannot keep tensors private");
  const login = `Basic ${btoa(`${device}:${password}`)}`;
  const manifest = parseManifest(await request("manifest", login));
  const { inputs, labels } = toTensors(manifest, examples);
  const tasks = Object.keys(labels);
  const held = heldBlocks(manifest, modalities, tasks);
  const isOwn = (block) => block.is_frozen || block.task?.personalizes; // whatever the server says
  const isShared = (block) => !isOwn(block) && !privateBlocks.includes(block.name);
  await fetchArtifacts(manifest, held, isShared, login);
  const engine = new Engine(artifacts);
  let state = unpack(read(stateFile) ?? pack({ round_num: 0, private: {}, outbox: [] }));
  const shared = {}; // by block: version, digest, data

  const session = JSON.parse(await request("session", login));
  const isAside = /^(localhost|127\.[\d.]+|::1)$/.test(session.mqtt_host);
  if (url.startsWith("https:") && !session.mqtt_is_tls && !isAside) {
    throw new Error("the server has TLS, and its broker none: no password is sent there");
  }
  const topics = topicsOf(federation, device);
  const offline = encode("status", { is_online: false });
  const secret = createHash("sha256").update(password).digest("hex").slice(0, 16);
  const mqtt = await connectAsync({
    protocol: session.mqtt_is_tls ? "mqtts" : "mqtt",
    host: session.mqtt_host, port: session.mqtt_port, username: device, password,
    clientId: `${federation}-${device}-${secret}`, protocolVersion: 4, keepalive: 60,
    reconnectPeriod: 1000 + 1000 * Math.random(), resubscribe: false, // `announce` does
    will: { topic: topics.status, payload: offline, qos: 1, retain: true },
  }, false);
  const publish = (topic, data, retain) => mqtt.publishAsync(topic, data, { qos: 1, retain });
  const uplink = new Uplink(publish, topics);
  const inbox = []; // tasks
  mqtt.on("message", (_, data) => {
    try {
      const message = decode(data);
      if (message.t === "receipt") uplink.receive(message);
      if (message.t === "task" || message.t === "finish") inbox.push(message);
      mqtt.emit("arrival");
    } catch (error) {
      complain(error);
    }
  });
  mqtt.on("error", complain);
  mqtt.on("connect", () => announce().catch(complain)); // again
  process.once("SIGTERM", () => leave(0)).once("SIGINT", () => leave(0));

  async function announce() {
    await mqtt.subscribeAsync(topics.down, { qos: 1 });
    await publish(topics.status, encode("status", { is_online: true }), true);
    await publish(topics.request, encode("ready", { modalities, tasks }), true);
  }

  let farewell; // said once

  /** If the broker is there to hear it. */
  function goodbye() {
    const said = () => publish(topics.status, offline, true).then(() => {
      mqtt.off("error", complain).on("error", () => {}); // heard: now the broker may hang up
      return mqtt.endAsync();
    });
    return (farewell ??= Promise.race([said(), sleep(2000)]));
  }

  async function leave(status) {
    await goodbye();
    process.exit(status);
  }

  /** Tries until the server gives them: it may be on its way back. */
  async function fetchBlocks(pointers) {
    const pause = pauses();
    for (const [name, { version, sha256: digest }] of Object.entries(pointers)) {
      while (shared[name]?.digest !== digest) {
        const data = await request(`blocks/${name}/${version}`, login, { digest }).catch(complain);
        if (data) shared[name] = { version, digest, data };
        else await sleep(pause.next().value);
      }
    }
  }

  function startOf(block) {
    if (isShared(block)) return toVector(block, shared[block.name].data);
    const initial = join(artifacts, block.artifacts.parameters.path);
    return toVector(block, state.private[block.name] ?? read(initial));
  }

  const starts = () => Object.fromEntries(held.map((block) => [block.name, startOf(block)]));

  /** Trains, then writes round, private blocks and outbox in one step. */
  async function trainRound(task) {
    rmSync(ownFile, { force: true }); // of an earlier finish
    const before = starts();
    const draws = new Draws(task.seed, task.round_num, device);
    const names = Object.keys(task.blocks);
    const uploads = task.uploads ?? names;
    const h = task.hyperparameters;
    const result = await train(engine, manifest, before, inputs, labels, h, draws, names);
    const about = { round_num: task.round_num, num_examples: result.numExamples };
    const outbox = [];
    const kept = { ...state.private };
    for (const block of held) {
      const after = result.parameters[block.name];
      if (!isShared(block) && !block.is_frozen) kept[block.name] = toBytes(after);
      if (!isShared(block) || !uploads.includes(block.name)) continue;
      const payload = toBytes(after.map((x, i) => x - before[block.name][i]));
      outbox.push({ payload, message: encode("update", {
        ...about, update_id: randomBytes(16), block: block.name, codec: "f32",
        base_version: task.blocks[block.name].version,
        num_bytes: payload.length, sha256: sha256(payload),
      }) });
    }
    const report = encode("report", { ...about, update_id: randomBytes(16), loss: result.loss });
    outbox.push({ payload: Buffer.alloc(0), message: report });
    state = { round_num: task.round_num, private: kept, outbox };
    write(stateFile, pack(state));
    console.log(`round ${task.round_num}: loss ${result.loss.toFixed(4)}`);
  }

  /** After the last round: the device's own model, which no round starts from. */
  async function fineTune({ blocks, hyperparameters: h, seed = 0 }) {
    const origin = JSON.stringify([state.round_num, Object.entries(blocks).sort(), h, seed]);
    if (h && read(ownFile) && unpack(read(ownFile)).origin === origin) return; // it is made
    rmSync(ownFile, { force: true });
    if (!h) return;
    const draws = new Draws(seed, 0, device);
    const names = Object.keys(blocks);
    const result = await train(engine, manifest, starts(), inputs, labels, h, draws, names);
    const trained = held.filter((block) => !block.is_frozen).map((block) => block.name);
    const vectors = trained.map((name) => [name, toBytes(result.parameters[name])]);
    write(ownFile, pack({ origin, vectors: Object.fromEntries(vectors) }));
    console.log(`fine-tuning: loss ${result.loss.toFixed(4)}`);
  }

  /** Until all is delivered, or the server has gone on: then the rest no longer counts. */
  async function deliverOutbox() {
    for (const outgoing of state.outbox) {
      if (inbox.some((message) => message.round_num !== state.round_num)) break;
      const receipt = await uplink.deliver(outgoing);
      if (receipt.status === "rejected") console.error(`rejected: ${receipt.reason}`);
    }
    state = { ...state, outbox: [] };
    write(stateFile, pack(state));
  }

  try {
    await announce();
    for (;;) {
      while (!inbox.length) await once(mqtt, "arrival");
      const task = inbox.splice(0).pop(); // the last one: what came before no longer matters
      if (task.num_holders) throw new Error("this client has no control variates");
      const own = held.filter(isShared).map((block) => block.name);
      const asked = [...Object.keys(task.blocks), ...(task.uploads ?? [])];
      const foreign = asked.filter((name) => !own.includes(name));
      if (foreign.length) throw new Error(`the server asks for ${foreign}, which is not shared`);
      if (task.t === "finish" || task.round_num > state.round_num) {
        await fetchBlocks(task.blocks);
      }
      if (task.t === "finish") {
        write(join(store, "shared.msgpack"), pack(shared)); // with state.msgpack, the final model
        await goodbye(); // no round waits for this device
        await fineTune(task);
        break;
      }
      if (task.round_num > state.round_num) await trainRound(task);
      if (task.round_num === state.round_num) await deliverOutbox();
    }
    await leave(0);
  } catch (error) {
    complain(error);
    await leave(1);
  }
}

/** One line. */
function complain(error) {
  console.error(`${error.message} ${error.cause?.message ?? ""}`.split("\n")[0].trim());
}

main().catch((error) => {
  complain(error);
  process.exit(1);
});
