// graphile-worker: 50 slots; GRAPHILE_TUNED=1 adds its local queue of 500 and batched completion, its fastest mode.
import { openSync, writeSync } from "node:fs";
import { createRequire } from "node:module";

// Its package lies where this benchmark installed it, not beside this file.
const { makeWorkerUtils, run } = createRequire(process.env.BENCH_NODE + "/")("graphile-worker");

const jobs = Number(process.env.BENCH_JOBS);
const sleep = Number(process.env.BENCH_SLEEP) * 1000;
const connectionString = process.env.BENCH_POSTGRES;
const file = openSync(process.env.BENCH_SLOTS, "r+");

function write(slot) {
  const now = Buffer.alloc(8);
  now.writeBigInt64LE(process.hrtime.bigint());
  writeSync(file, now, 0, 8, 8 * slot);
}

async function job({ number }) {
  write(number);
  await new Promise((resolve) => setTimeout(resolve, sleep));
  write(jobs + number);
}

async function fill() {
  const utils = await makeWorkerUtils({ connectionString });
  await utils.migrate();
  await utils.withPgClient((client) =>
    client.query(
      "select graphile_worker.add_job('job', json_build_object('number', n)) from generate_series(0, $1::int - 1) n",
      [jobs],
    ),
  );
  await utils.release();
}

async function work() {
  const tuned = process.env.GRAPHILE_TUNED === "1";
  const worker = tuned ? { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } : {};
  const runner = await run({
    connectionString,
    concurrency: 50,
    taskList: { job },
    noHandleSignals: true,
    preset: { worker: { concurrentJobs: 50, maxPoolSize: 50, ...worker } },
  });
  await runner.promise;
}

await (process.argv.includes("fill") ? fill() : work());
