// From an image's RGB bytes to what the model takes: Pillow's antialiased resize, centre crop, rescale and normalise.
// The arithmetic is that of Pillow's Resample.c, in integers of 8 bits, so that a browser's own scaling plays no part.

const PRECISION = 2 ** 22;

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// by Pillow's numbers: support, weight at a distance
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, (x) => {
    const d = Math.abs(x);
    if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
    return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
  }],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  5: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
};

/** Of each output pixel along one side: the first input pixel, and the weights from there on. */
function weights(from, to, filter) {
  const [reach, weigh] = FILTERS[filter];
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = reach * stretch;
  return Array.from({ length: to }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const found = Array.from({ length: end - first }, (_, step) => weigh((step + first - centre + 0.5) / stretch));
    const sum = found.reduce((total, each) => total + each, 0);
    const whole = found.map((each) => Math.trunc((sum ? each / sum : each) * PRECISION + (each < 0 ? -0.5 : 0.5)));
    return { first, whole };
  });
}

/** One pass: `count` lines of `from` pixels become lines of `to`; strides are in bytes. */
function pass(source, target, { count, from, to, filter, channels, along, across, alongOut, acrossOut }) {
  weights(from, to, filter).forEach(({ first, whole }, index) => {
    for (let line = 0; line < count; line += 1) {
      for (let channel = 0; channel < channels; channel += 1) {
        let sum = PRECISION / 2;
        const start = line * across + first * along + channel;
        for (let step = 0; step < whole.length; step += 1) sum += source[start + step * along] * whole[step];
        // a Uint8ClampedArray holds the result within 0 to 255
        target[line * acrossOut + index * alongOut + channel] = Math.floor(sum / PRECISION);
      }
    }
  });
  return target;
}

/** `bytes` `[height, width, channels]` in another size, as `PIL.Image.resize` with a filter's number gives it. */
export function resize(bytes, [height, width], [rows, columns], channels, filter) {
  if (!(filter in FILTERS)) throw new Error(`resample ${filter} is none of ${Object.keys(FILTERS).join(", ")}`);
  let pixels = bytes;
  if (columns !== width) {
    const out = new Uint8ClampedArray(height * columns * channels);
    const strides = { along: channels, across: width * channels, alongOut: channels, acrossOut: columns * channels };
    pixels = pass(pixels, out, { count: height, from: width, to: columns, filter, channels, ...strides });
  }
  if (rows !== height) {
    const out = new Uint8ClampedArray(rows * columns * channels);
    const strides = { along: columns * channels, across: channels, alongOut: columns * channels, acrossOut: channels };
    pixels = pass(pixels, out, { count: columns, from: height, to: rows, filter, channels, ...strides });
  }
  return pixels;
}

/** RGBA bytes, as a canvas has them, as RGB or as grey (ITU-R 601-2 as Pillow has it); alpha is left out. */
export function colours(rgba, channels) {
  const count = rgba.length / 4;
  const out = new Uint8ClampedArray(count * channels);
  for (let index = 0; index < count; index += 1) {
    const [red, green, blue] = [rgba[4 * index], rgba[4 * index + 1], rgba[4 * index + 2]];
    if (channels === 1) out[index] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    else out.set([red, green, blue], 3 * index);
  }
  return out;
}

/**
 * What the model takes of an image, float32 `[channels, rows, columns]`.
 *
 * `rgba` are its bytes `[height, width, 4]`; `settings` are those of `manifest.json` under `image`.
 */
export function prepare(rgba, [height, width], settings) {
  const { channels, size, resample, crop, rescale, mean, std } = settings;
  const pixels = resize(colours(rgba, channels), [height, width], size, channels, resample);
  const [rows, columns] = crop ?? size;
  const [top, left] = [Math.trunc((size[0] - rows) / 2), Math.trunc((size[1] - columns) / 2)];
  const out = new Float32Array(channels * rows * columns);
  for (let channel = 0; channel < channels; channel += 1) {
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const value = pixels[((row + top) * size[1] + column + left) * channels + channel];
        out[(channel * rows + row) * columns + column] = (value * rescale - mean[channel]) / std[channel];
      }
    }
  }
  return out;
}
