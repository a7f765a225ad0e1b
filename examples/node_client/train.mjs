// One round of local training: docs/protocol.md, section 6.
import { createHash } from "node:crypto";
import { Tensor } from "onnxruntime-node";
import { floats, heldBlocks, labelTask, sizeOf, toBytes, toVector, zeros } from "./model.mjs";

const HYPERPARAMETERS = new Set([
  "learning_rate", "momentum", "weight_decay", "batch_size", "epochs", "optimizer", "nesterov",
  "beta1", "beta2", "epsilon", "max_grad_norm", "accumulation", "proximal_mu", "max_steps",
  "method",
]);

/** What chance decides, fixed by seed, round and device (mulberry32). */
export class Draws {
  constructor(...seeds) {
    this.state = createHash("sha256").update(seeds.join("/")).digest().readInt32LE();
  }

  /** In [0, 1). */
  uniform() {
    this.state = (this.state + 0x6d2b79f5) | 0;
    let x = Math.imul(this.state ^ (this.state >>> 15), this.state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  }

  permutation(n) {
    const order = Array.from({ length: n }, (_, i) => i);
    for (let i = n - 1; i > 0; i--) {
      const j = Math.floor(this.uniform() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }

  mask(dims, rate) {
    const keep = () => (this.uniform() >= rate ? 1 / (1 - rate) : 0);
    return floats(Float32Array.from({ length: sizeOf(dims) }, keep), dims);
  }
}

/**
 * Trains the blocks of the modalities in `inputs` and the tasks in `labels`, both tensors by name.
 * `before`: vectors by block; `shared`: the blocks that proximal_mu acts on.
 */
export async function train(engine, manifest, before, inputs, labels, h, draws, shared) {
  const unknown = Object.keys(h).find((name) => !HYPERPARAMETERS.has(name));
  if (unknown) throw new Error(`the server asks for ${unknown}, which this client does not know`);
  if (!["fedsim", "fedalt"].includes(h.method)) throw new Error(`unknown method ${h.method}`);
  const held = heldBlocks(manifest, Object.keys(inputs), Object.keys(labels));
  const numExamples = Object.values(inputs)[0].dims[0];
  const phases = phasesOf(held, shared, h.method).map((trained) => ({
    trained, batches: cutBatches(numExamples, held, h, draws),
  }));
  const after = Object.fromEntries(held.map((b) => [b.name, before[b.name].slice()]));
  const graph = manifest.optimizers[h.optimizer];
  const moments = {}; // by block, for this round
  const losses = [];
  for (const { trained, batches } of phases) {
    for (const [i, batch] of batches.entries()) {
      const masks = drawMasks(held, batch.length, inputs, draws);
      const step = await chainedStep(
        engine, manifest, held, after, take(inputs, batch), take(labels, batch), masks,
      );
      if (!Number.isFinite(step.loss)) throw new Error(`training diverged: loss ${step.loss}`);
      const gradients = only(trained, step.gradients);
      await descend(engine, graph, h, after, before, gradients, moments, i + 1, shared);
      for (const [name, tail] of Object.entries(only(trained, step.statistics))) {
        after[name].set(tail, after[name].length - tail.length);
      }
      losses.push(step.loss);
    }
  }
  for (const block of held) toVector(block, toBytes(after[block.name])); // all finite
  const loss = losses.reduce((sum, x) => sum + x) / losses.length;
  return { parameters: after, numExamples, loss };
}

/** The names of the blocks that train together, phase by phase. */
function phasesOf(held, shared, method) {
  const isShared = (block) => shared.includes(block.name);
  const parts = method === "fedalt"
    ? [held.filter((block) => !isShared(block)), held.filter(isShared)]
    : [held];
  const training = parts.filter((part) => part.some((block) => block.num_trainable));
  return training.map((part) => part.map((block) => block.name));
}

const only = (names, byName) =>
  Object.fromEntries(Object.entries(byName).filter(([name]) => names.includes(name)));

function cutBatches(numExamples, held, h, draws) {
  const shortest = Math.max(...held.map((block) => block.min_batch));
  const batches = [];
  for (let epoch = 0; epoch < h.epochs; epoch++) {
    const order = draws.permutation(numExamples);
    for (let start = 0; start < numExamples; start += h.batch_size) {
      const batch = order.slice(start, start + h.batch_size);
      if (batch.length >= shortest) batches.push(batch);
    }
    if (h.max_steps) batches.splice(h.max_steps);
  }
  if (!batches.length) throw new Error(`batches need ${shortest} examples, found ${numExamples}`);
  return batches;
}

function drawMasks(held, batchSize, inputs, draws) {
  const masks = {};
  for (const block of held) {
    masks[block.name] = {};
    for (const dropout of block.dropouts) {
      const varying = [...dropout.varying];
      const dims = dropout.shape.map((dim) => {
        if (dim !== null) return dim;
        const [modality, axis] = varying.shift().split(".");
        return inputs[modality]?.dims[Number(axis)] ?? 1;
      });
      masks[block.name][dropout.name] = draws.mask([batchSize, ...dims], dropout.rate);
    }
  }
  return masks;
}

/** Loss, gradients by block and new running statistics by block, of one batch. */
async function chainedStep(engine, manifest, held, parameters, inputs, labels, masks) {
  const values = { ...inputs };
  const [feeds, statistics, gradients, upstream] = [{}, {}, {}, {}];
  const reached = new Set();
  for (const block of held) {
    if (block.num_trainable || block.inputs.some((x) => reached.has(x))) reached.add(block.name);
    const vector = floats(parameters[block.name], [block.size]);
    const feed = { ...feedOf(manifest, block, values), ...masks[block.name], parameters: vector };
    feeds[block.name] = feed;
    if (block.kind === "head") continue;
    const graph = block.artifacts.training_forward ?? block.artifacts.eval_model; // of a frozen one
    for (const [name, value] of Object.entries(await engine.run(graph, feed))) {
      if (name === "statistics") statistics[block.name] = value.data;
      else if (name.startsWith("saved.")) feed[name] = value;
      else values[name] = value;
    }
  }
  let loss = 0;
  for (const block of held.toReversed().filter((b) => reached.has(b.name))) {
    const feed = feeds[block.name];
    if (block.kind === "head") feed.labels = labels[labelTask(block)];
    for (const { name } of block.kind === "head" ? [] : block.outputs) {
      feed[`d_${name}`] = upstream[name] ?? zeros(values[name].dims);
    }
    const weight = block.task?.weight ?? 1;
    const outputs = await engine.run(block.artifacts.training_backward, feed);
    for (const [name, value] of Object.entries(outputs)) {
      if (name === "loss") loss += weight * value.data[0];
      else if (name === "statistics") statistics[block.name] = value.data;
      else if (name === "gradient") gradients[block.name] = value.data.map((g) => weight * g);
      else addTo(upstream, name.slice("d_".length), value, weight);
    }
  }
  return { loss, gradients, statistics };
}

/** A block's input tensors, zeros for what is absent, and what is present. */
function feedOf(manifest, block, values) {
  const numExamples = Object.values(values)[0].dims[0];
  const feed = {};
  const present = [];
  for (const name of block.inputs) {
    if (name in manifest.modalities) {
      feed[name] = values[name];
      continue;
    }
    const { outputs } = manifest.blocks.find((b) => b.name === name);
    present.push(outputs[0].name in values ? 1 : 0);
    for (const tensor of outputs) {
      const dims = [numExamples, ...tensor.shape.map((dim) => dim ?? 1)];
      feed[tensor.name] = values[tensor.name] ?? zeros(dims);
    }
  }
  if (manifest.missing === "mask") {
    const rows = Array(numExamples).fill(present).flat();
    feed.present = floats(Float32Array.from(rows), [numExamples, present.length]);
  }
  return feed;
}

function addTo(sums, name, tensor, weight) {
  const known = sums[name]?.data;
  const data = tensor.data.map((g, i) => weight * g + (known ? known[i] : 0));
  sums[name] = floats(data, tensor.dims);
}

/** One step of the optimizer's graph for every block with a gradient; changes `vectors`. */
async function descend(engine, graph, h, vectors, start, gradients, moments, step, shared) {
  let squares = 0;
  for (const gradient of Object.values(gradients)) for (const g of gradient) squares += g * g;
  const limit = h.max_grad_norm || Infinity;
  const gradient_scale = Math.min(1, limit / (Math.sqrt(squares) + 1e-6));
  for (const [name, gradient] of Object.entries(gradients)) {
    const proximal = shared.includes(name) ? h.proximal_mu : 0;
    const scalars = Object.entries({ ...h, gradient_scale, proximal, step });
    const dims = [gradient.length];
    const leading = (vector) => floats(vector.slice(0, gradient.length), dims);
    const blank = zeros(dims);
    const { new_parameters: moved, ...rest } = await engine.run(graph, {
      ...Object.fromEntries(scalars.map(([k, x]) => [k, floats(Float32Array.of(Number(x)), [])])),
      velocity: blank, first_moment: blank, second_moment: blank, ...moments[name],
      gradient: floats(gradient, dims), parameters: leading(vectors[name]),
      anchor: leading(start[name]),
    });
    vectors[name].set(moved.data);
    moments[name] = {};
    for (const [key, x] of Object.entries(rest)) moments[name][key.slice("new_".length)] = x;
  }
}

/** The rows `indices` of every tensor. */
function take(tensors, indices) {
  return Object.fromEntries(Object.entries(tensors).map(([name, { type, data, dims }]) => {
    const width = sizeOf(dims.slice(1));
    const rows = new data.constructor(indices.length * width);
    indices.forEach((row, i) => rows.set(data.subarray(row * width, (row + 1) * width), i * width));
    return [name, new Tensor(type, rows, [indices.length, ...dims.slice(1)])];
  }));
}
