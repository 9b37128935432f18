"use strict";
// Masks to smooth outlines. A mask is an uncompressed COCO run-length encoding: runs of 0 and 1 down the columns.

function readMask({ size: [height, width], counts }) {
  const pixels = new Uint8Array(height * width); // column after column
  let at = 0;
  counts.forEach((count, index) => {
    if (index % 2) pixels.fill(1, at, at + count);
    at += count;
  });
  return { width, height, at: (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : pixels[x * height + y]) };
}

// Marching squares between pixel centres. Points are counted in half pixels, so that they are whole numbers:
// for the four corners (8, 4, 2, 1 clockwise from the top left) of a cell, the sides that the outline joins.
const SIDES = { T: [1, 0], R: [2, 1], B: [1, 2], L: [0, 1] };
const JOINED = ["", "LB", "BR", "LR", "RT", "LBRT", "BT", "LT", "TL", "TB", "TLBR", "TR", "RL", "RB", "BL", ""];

function maskLoops(mask) {
  const row = 2 * mask.width + 5;
  const next = new Map();
  for (let y = -1; y < mask.height; y++) {
    for (let x = -1; x < mask.width; x++) {
      const corners =
        8 * mask.at(x, y) + 4 * mask.at(x + 1, y) + 2 * mask.at(x + 1, y + 1) + mask.at(x, y + 1);
      const sides = JOINED[corners];
      for (let i = 0; i < sides.length; i += 2) {
        const [from, to] = [SIDES[sides[i]], SIDES[sides[i + 1]]];
        const place = ([dx, dy]) => (2 * (y + 1) + dy) * row + 2 * (x + 1) + dx;
        next.set(place(from), place(to));
      }
    }
  }
  const loops = [];
  while (next.size) {
    const loop = [];
    let place = next.keys().next().value;
    while (next.has(place)) {
      loop.push([((place % row) - 1) / 2, (Math.floor(place / row) - 1) / 2]);
      const following = next.get(place);
      next.delete(place);
      place = following;
    }
    loops.push(loop);
  }
  return loops;
}

// The steps between pixels made smooth: every point moves towards its neighbours, by less than a pixel.
function smooth(loop) {
  if (loop.length < 12) return loop;
  const near = (i, axis) => [-1, 0, 0, 1].reduce((sum, step) => sum + loop.at((i + step) % loop.length)[axis], 0) / 4;
  return loop.map((_, i) => [near(i, 0), near(i, 1)]);
}

// An SVG path over a picture of `width` x `height`; curves through the middles between the points.
function maskPath(rle, width, height) {
  const mask = readMask(rle);
  const [scaleX, scaleY] = [width / mask.width, height / mask.height];
  const write = (x, y) => `${+(x * scaleX).toFixed(2)} ${+(y * scaleY).toFixed(2)}`;
  return maskLoops(mask)
    .map((loop) => smooth(smooth(loop)))
    .map((loop) => {
      const middle = (i) => {
        const [a, b] = [loop[i % loop.length], loop[(i + 1) % loop.length]];
        return write((a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
      };
      return `M${middle(0)}` + loop.map((_, i) => {
        const corner = loop[(i + 1) % loop.length];
        return `Q${write(corner[0], corner[1])} ${middle(i + 1)}`;
      }).join("") + "Z";
    })
    .join("");
}
