import pg from "pg";

// One pool per server process. `next dev` loads modules again at every change: the pool outlives that on globalThis.
const kept = globalThis as { campaignPool?: pg.Pool };

export const pool: pg.Pool = (kept.campaignPool ??= new pg.Pool({
  ...(process.env.DATABASE_URL ? { connectionString: process.env.DATABASE_URL } : {}), // else PGHOST, PGUSER, PGDATABASE ...
  max: 5,
}));

/** Runs `work` in a transaction: all that it writes is there afterwards, or, if it throws, nothing. */
export async function inTransaction<T>(work: (client: pg.PoolClient) => Promise<T>): Promise<T> {
  const client = await pool.connect();
  let broken: Error | undefined;
  try {
    await client.query("begin");
    const result = await work(client);
    await client.query("commit");
    return result;
  } catch (error) {
    await client.query("rollback").catch((failure: Error) => (broken = failure));
    throw error;
  } finally {
    client.release(broken); // a connection that could not roll back is closed, not given to the next request
  }
}
