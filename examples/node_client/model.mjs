// The manifest, the graphs, the device's data and files: docs/protocol.md, sections 4 to 6.
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { dirname, join } from "node:path";
import { InferenceSession, Tensor } from "onnxruntime-node";

export const sha256 = (data) => createHash("sha256").update(data).digest("hex");
export const sizeOf = (dims) => dims.reduce((product, dim) => product * dim, 1);
export const floats = (data, dims) => new Tensor("float32", data, dims);
export const zeros = (dims) => floats(new Float32Array(sizeOf(dims)), dims);
export const toBytes = (vector) => Buffer.from(vector.buffer, vector.byteOffset, vector.byteLength);

/** A block's vector from its bytes. */
export function toVector(block, data) {
  const vector = new Float32Array(new Uint8Array(data).buffer); // a copy, aligned
  if (vector.length === block.size && vector.every(Number.isFinite)) return vector;
  throw new Error(`block ${block.name}: expected ${block.size} finite values`);
}

export function parseManifest(data) {
  const manifest = JSON.parse(data);
  if (manifest.format_version !== 2) throw new Error("expected a manifest of format_version 2");
  const files = manifest.blocks.flatMap((block) => Object.values(block.artifacts));
  for (const file of [...files, ...Object.values(manifest.optimizers)]) {
    if (file && !/^[a-z0-9-]+\/\w+\.\w+$/.test(file.path)) throw new Error(`path ${file.path}`);
  }
  return manifest;
}

/** The task whose labels a head learns: a personal one learns that of the head beside it. */
export function labelTask(head) {
  return head.task.personalizes ?? head.name.replace(/^head-/, "");
}

/** Heads by task, without personal ones. */
function headsOf(manifest) {
  const heads = manifest.blocks.filter((b) => b.kind === "head" && !b.task.personalizes);
  return Object.fromEntries(heads.map((head) => [labelTask(head), head]));
}

/** The blocks of a device with these modalities and labels of these tasks, in order. */
export function heldBlocks(manifest, modalities, tasks) {
  const inReach = new Set(modalities); // and the encoders behind them
  return manifest.blocks.filter((block) => {
    if (block.kind === "head") return tasks.includes(labelTask(block));
    if (block.kind === "fusion") return true;
    return inReach.has(block.inputs[0]) && inReach.add(block.name);
  });
}

/** {"inputs": {MODALITY: nested lists}, "labels": nested lists, or those by task} as tensors. */
export function toTensors(manifest, { inputs, labels }) {
  const heads = headsOf(manifest);
  const byTask = Array.isArray(labels) ? { [Object.keys(heads)[0]]: labels } : labels;
  const tensors = { inputs: {}, labels: {} };
  for (const [name, values] of Object.entries(inputs)) {
    const modality = manifest.modalities[name];
    if (!modality) throw new Error(`the model has no modality ${name}`);
    tensors.inputs[name] = toTensor(name, values, modality.shape, modality.num_values,
      modality.ranges);
  }
  for (const [task, values] of Object.entries(byTask)) {
    if (!heads[task]) throw new Error(`the model has no task ${task}`);
    const { shape } = heads[task].outputs[0];
    const isClass = heads[task].task.loss === "cross_entropy";
    tensors.labels[task] = toTensor(task, values, isClass ? [] : shape, isClass ? shape[0] : null);
  }
  const all = [...Object.values(tensors.inputs), ...Object.values(tensors.labels)];
  if (new Set(all.map((t) => t.dims[0])).size !== 1) throw new Error("examples differ in number");
  return tensors;
}

/** Float32, or int64 in [0, limit) where there is a limit. */
function toTensor(name, nested, shape, limit, ranges = []) {
  const dims = [];
  for (let part = nested; Array.isArray(part); part = part[0]) dims.push(part.length);
  const numbers = [nested].flat(Infinity);
  const isFit = (dim, i) => dim === dims[i] || (dim === null && dims[i] > 0);
  if (dims.length !== shape.length + 1 || ![null, ...shape].every(isFit)
    || numbers.length !== sizeOf(dims)) throw new Error(`${name}: (${dims}) is not (n, ${shape})`);
  const lengths = dims.slice(1).filter((_, i) => shape[i] === null);
  if (ranges.some(([low, high], i) => lengths[i] < low || lengths[i] > high)) {
    throw new Error(`${name}: (${dims}), expected lengths in ${JSON.stringify(ranges)}`);
  }
  const isValid = (x) => Number.isFinite(x) && (!limit || (x >= 0 && x < limit));
  if (!numbers.every(isValid)) throw new Error(`${name}: a value is out of range`);
  if (limit) return new Tensor("int64", BigInt64Array.from(numbers, BigInt), dims);
  return floats(Float32Array.from(numbers), dims);
}

/** Runs the graphs of an artifacts folder. */
export class Engine {
  constructor(folder) {
    Object.assign(this, { folder, sessions: {} }); // by path
  }

  /** All outputs by name; of `feeds`, the graph gets what it takes. */
  async run(artifact, feeds) {
    const options = { intraOpNumThreads: 1, interOpNumThreads: 1, logSeverityLevel: 3 };
    const open = () => InferenceSession.create(join(this.folder, artifact.path), options);
    const session = (this.sessions[artifact.path] ??= await open());
    return session.run(Object.fromEntries(session.inputNames.map((name) => [name, feeds[name]])));
  }
}

/** Replaces the file: after a power cut it holds the old bytes or the new ones. */
export function write(path, data) {
  fs.mkdirSync(dirname(path), { recursive: true });
  fs.writeFileSync(`${path}.tmp`, data, { mode: 0o600, flush: true });
  fs.renameSync(`${path}.tmp`, path);
  const folder = fs.openSync(dirname(path), "r");
  fs.fsyncSync(folder);
  fs.closeSync(folder);
}

export const read = (path) => (fs.existsSync(path) ? fs.readFileSync(path) : null);
