// What every job body does, in Node: as slots.py.
import { openSync, writeSync } from "node:fs";
import { createRequire } from "node:module";

export const jobs = Number(process.env.BENCH_JOBS);
export const sleep = Number(process.env.BENCH_SLEEP) * 1000;
export const text = "x".repeat(Number(process.env.BENCH_TEXT ?? 0));
const step = Number(process.env.BENCH_STEP ?? 0.02) * 1000;
const file = openSync(process.env.BENCH_SLOTS, "r+");
const buffer = Buffer.alloc(8);

// Packages lie where this benchmark installed them, not beside this file.
export const required = createRequire(process.env.BENCH_NODE + "/");

function write(slot) {
  buffer.writeBigInt64LE(process.hrtime.bigint());
  writeSync(file, buffer, 0, 8, 8 * slot);
}

export async function work(number) {
  write(number);
  if (sleep) {
    await new Promise((resolve) => setTimeout(resolve, sleep));
    write(jobs + number);
  }
}

export const enqueued = (number) => write(2 * jobs + number);

// The numbers of all jobs, each at its time; who is late catches up.
export async function* paced() {
  const begun = performance.now();
  for (let number = 0; number < jobs; number++) {
    const left = begun + number * step - performance.now();
    if (left > 0) await new Promise((resolve) => setTimeout(resolve, left));
    yield number;
  }
}
