// node runtime_parity.mjs REQUEST.json: runs an ONNX file in onnxruntime-web (WebAssembly, one thread), as a browser does.
//
// The request: `web`, a folder with node_modules/onnxruntime-web; `model`, `pixels` (float32) and their `shape` of one
// sample; `sizes` of the batches; `inputs`, further ones by name; `output`, a folder for each output's numbers.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const { web, model, pixels, shape, sizes, inputs, output } = JSON.parse(readFileSync(process.argv[2], "utf8"));
const ort = createRequire(join(web, "index.js"))("onnxruntime-web");
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
const session = await ort.InferenceSession.create(readFileSync(model), { executionProviders: ["wasm"] });
const bytes = readFileSync(pixels);
const values = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
const numbers = Object.entries(inputs).map(([name, list]) => [name, new ort.Tensor("float32", list, [list.length])]);
const length = shape.reduce((product, size) => product * size);
const found = Object.fromEntries(session.outputNames.map((name) => [name, []]));
let start = 0;
for (const size of sizes) {
  const batch = values.subarray(start * length, (start + size) * length);
  const feeds = { pixel_values: new ort.Tensor("float32", batch, [size, ...shape]), ...Object.fromEntries(numbers) };
  const answers = await session.run(feeds);
  for (const name of session.outputNames) {
    const { buffer, byteOffset, byteLength } = answers[name].data;
    found[name].push(Buffer.from(buffer, byteOffset, byteLength));
  }
  start += size;
}
for (const name of session.outputNames) writeFileSync(join(output, `${name}.bin`), Buffer.concat(found[name]));
