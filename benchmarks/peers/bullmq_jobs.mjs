// BullMQ: a Node process with 50 jobs at a time, finished jobs removed.
import { enqueued, jobs, paced, required, text, work as body } from "./slots.mjs";

const { Queue, Worker } = required("bullmq");
const { Redis } = required("ioredis");
const connection = new Redis(process.env.BENCH_REDIS, { maxRetriesPerRequest: null });
const opts = { removeOnComplete: true };
const chunk = 1000;

async function fill() {
  const queue = new Queue("bench", { connection });
  for (let first = 0; first < jobs; first += chunk) {
    const numbers = Array.from({ length: Math.min(chunk, jobs - first) }, (_, i) => first + i);
    await queue.addBulk(numbers.map((number) => ({ name: "job", data: { number, text }, opts })));
  }
  await queue.close();
  connection.disconnect();
}

async function produce() {
  const queue = new Queue("bench", { connection });
  for await (const number of paced()) {
    await queue.add("job", { number, text }, opts);
    enqueued(number);
  }
  await queue.close();
  connection.disconnect();
}

async function work() {
  const worker = new Worker("bench", (job) => body(job.data.number), { connection, concurrency: 50 });
  worker.on("error", (error) => console.error(error));
  await new Promise(() => {});
}

await { fill, produce, work }[process.argv[2]]();
