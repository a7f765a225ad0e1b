// One round of training on given inputs, to compare with another implementation: msgpack on stdin
// to msgpack on stdout.
import { decode, encode } from "@msgpack/msgpack";
import { Engine, heldBlocks, parseManifest, read, toBytes, toTensors, toVector } from "./model.mjs";
import { Draws, train } from "./train.mjs";

/** Draws, and keeps what was drawn. */
class Recorder extends Draws {
  orders = [];
  masks = [];

  permutation(n) {
    this.orders.push(super.permutation(n));
    return this.orders.at(-1);
  }

  mask(dims, rate) {
    const mask = super.mask(dims, rate);
    this.masks.push(toBytes(mask.data));
    return mask;
  }
}

const given = decode(read("/dev/stdin"));
const manifest = parseManifest(read(`${given.artifacts}/manifest.json`));
const { inputs, labels } = toTensors(manifest, given.examples);
const held = heldBlocks(manifest, Object.keys(inputs), Object.keys(labels));
const before = held.map((block) => [block.name, toVector(block, given.parameters[block.name])]);
const draws = new Recorder(given.seed, given.round_num, given.device);
const { parameters, loss } = await train(
  new Engine(given.artifacts), manifest, Object.fromEntries(before), inputs, labels,
  given.hyperparameters, draws, given.shared,
);
const after = Object.entries(parameters).map(([name, vector]) => [name, toBytes(vector)]);
const { orders, masks } = draws;
process.stdout.write(encode({ parameters: Object.fromEntries(after), loss, orders, masks }));
