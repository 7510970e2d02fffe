/* The cividis colour scale, and the text colour that is legible on it. */
const STOPS = [
  [0, 32, 76], [0, 42, 102], [0, 52, 110], [39, 63, 108], [60, 74, 107], [76, 85, 107], [91, 95, 109],
  [104, 106, 112], [117, 117, 117], [131, 129, 120], [146, 140, 120], [161, 152, 118], [176, 165, 114],
  [192, 177, 109], [209, 191, 102], [225, 204, 92], [243, 219, 79], [255, 233, 69],
];
const INKS = { light: "#ffffff", dark: "#000000" };

/** The colour of a value in 0..1, as [r, g, b]. */
function colour(value) {
  const x = Math.min(1, Math.max(0, value)) * (STOPS.length - 1);
  const i = Math.min(STOPS.length - 2, Math.floor(x));
  return STOPS[i].map((low, channel) => Math.round(low + (x - i) * (STOPS[i + 1][channel] - low)));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((part) => {
    const x = part / 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Set a cell's background, and the text colour with the greater contrast. */
export function paint(node, value) {
  const rgb = colour(value);
  const y = luminance(rgb);
  node.style.backgroundColor = `rgb(${rgb.join(" ")})`;
  node.style.color = 1.05 / (y + 0.05) >= (y + 0.05) / 0.05 ? INKS.light : INKS.dark;
}

/** The whole scale as a CSS gradient. */
export function gradient() {
  return `linear-gradient(to right, ${STOPS.map((rgb) => `rgb(${rgb.join(" ")})`).join(", ")})`;
}
