// graphile-worker: GRAPHILE_TUNED=1 adds its local queue of 500 and batched completion, its fastest mode.
import { enqueued, jobs, paced, required, sleep, text, work as body } from "./slots.mjs";

const { makeWorkerUtils, run } = required("graphile-worker");
const connectionString = process.env.BENCH_POSTGRES;
const concurrency = sleep ? 50 : 24;
const chunk = 10_000;

async function prepare() {
  const utils = await makeWorkerUtils({ connectionString });
  await utils.migrate();
  await utils.release();
}

async function fill() {
  const utils = await makeWorkerUtils({ connectionString });
  await utils.migrate();
  for (let first = 0; first < jobs; first += chunk) {
    const numbers = Array.from({ length: Math.min(chunk, jobs - first) }, (_, i) => first + i);
    await utils.addJobs(numbers.map((number) => ({ identifier: "job", payload: { number, text } })));
  }
  await utils.release();
}

async function produce() {
  const utils = await makeWorkerUtils({ connectionString });
  for await (const number of paced()) {
    await utils.addJob("job", { number, text });
    enqueued(number);
  }
  await utils.release();
}

async function work() {
  const tuned = process.env.GRAPHILE_TUNED === "1";
  const worker = tuned ? { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } : {};
  const runner = await run({
    connectionString,
    concurrency,
    taskList: { job: ({ number }) => body(number) },
    noHandleSignals: true,
    preset: { worker: { concurrentJobs: concurrency, maxPoolSize: concurrency, ...worker } },
  });
  await runner.promise;
}

await { prepare, fill, produce, work }[process.argv[2]]();
