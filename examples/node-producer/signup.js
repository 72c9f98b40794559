// Signs somebody up, and enqueues the welcome mail in the same transaction: there is either both or nothing.
//
//   node signup.js ADDRESS [--urgent] [--fail]
//
// PostgreSQL is where DATABASE_URL says, or PGHOST, PGUSER, PGDATABASE ...

import { parseArgs } from "node:util";
import pg from "pg";

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { urgent: { type: "boolean" }, fail: { type: "boolean" } },
});
const [address] = positionals;
if (!address) {
  console.error("usage: node signup.js ADDRESS [--urgent] [--fail]");
  process.exit(2);
}

const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();
try {
  await client.query("create table if not exists signups (id bigint generated always as identity, address text not null)");
  console.log(await signUp(client, address, values));
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
} finally {
  await client.end();
}

/** Returns the job's id. */
async function signUp(client, address, { urgent, fail }) {
  await client.query("begin");
  try {
    const signup = await client.query("insert into signups (address) values ($1) returning id", [address]);
    const job = await enqueue(client, {
      queue_name: "email-sending",
      kind: "send_welcome_mail",
      payload: { signup_id: signup.rows[0].id, to: address },
      priority: urgent ? 10 : undefined,
      tags: ["signup"],
    });
    if (fail) throw new Error("something went wrong after the enqueue, so there is no job either");
    await client.query("commit");
    return job;
  } catch (error) {
    await client.query("rollback");
    throw error;
  }
}

/** Calls pmqd.enqueue in the client's transaction. What is not given is the queue's default. */
async function enqueue(client, { queue_name, payload, kind, priority, run_at, max_attempts, tags, id }) {
  const { rows } = await client.query(
    `select pmqd.enqueue(queue_name => $1, payload => $2, kind => $3, priority => $4, run_at => $5,
                         max_attempts => $6, tags => $7, id => $8) as id`,
    [queue_name, JSON.stringify(payload), kind, priority, run_at, max_attempts, tags, id],
  );
  return rows[0].id;
}
