import type { PoolClient } from "pg";

export interface Recipient {
  email: string;
  name: string;
  variables: Record<string, string>;
}

export interface Campaign {
  id: string;
  name: string;
  template: string;
  account: string | null;
  recipients: Recipient[];
}

/** What does not fit in a request, in words for its sender. */
export class CampaignError extends Error {}

const UUID = /^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$/i;
const MAX_RECIPIENTS = 10_000;

/**
 * Writes the campaign, its list, and the one job that makes mails of it, in the client's transaction.
 *
 * The campaign's id is the job's id too, so a request that is repeated because its answer was lost starts nothing twice: then the
 * list stays as it was given first.
 *
 * @returns whether the campaign is new.
 */
export async function startCampaign(client: PoolClient, campaign: Campaign): Promise<boolean> {
  const made = await client.query(
    "insert into penguinmails.campaigns (id, name, template, account) values ($1, $2, $3, $4) on conflict (id) do nothing",
    [campaign.id, campaign.name, campaign.template, campaign.account],
  );
  if (made.rowCount !== 1) return false;
  await client.query(
    `insert into penguinmails.recipients (campaign_id, email, name, variables)
     select $1, r.email, r.name, r.variables from jsonb_to_recordset($2::jsonb) as r(email text, name text, variables jsonb)`,
    [campaign.id, JSON.stringify(campaign.recipients)],
  );
  await client.query(
    `select pmqd.enqueue(queue_name => 'campaign:process', kind => 'campaign.process', id => $1::uuid,
                         payload => jsonb_build_object('campaign_id', $1::uuid), tags => array['campaign:' || $1::text])`,
    [campaign.id],
  );
  return true;
}

/** A request's body as a campaign; an address that comes again, in whatever case, is left out. */
export function readCampaign(body: unknown, newId: () => string): Campaign {
  const fields = record(body, "the body");
  const id = fields.id === undefined ? newId() : text(fields.id, "id");
  if (!UUID.test(id)) throw new CampaignError(`id is ${JSON.stringify(id)}, must be a UUID`);
  const list = fields.recipients;
  if (!Array.isArray(list) || list.length === 0 || list.length > MAX_RECIPIENTS) {
    throw new CampaignError(`recipients must be a list of 1 to ${MAX_RECIPIENTS}`);
  }
  const people = new Map<string, Recipient>();
  list.forEach((each: unknown, index) => {
    const recipient = readRecipient(each, `recipients[${index}]`);
    const key = recipient.email.toLowerCase();
    if (!people.has(key)) people.set(key, recipient);
  });
  return {
    id: id.toLowerCase(),
    name: fields.name === undefined ? "" : text(fields.name, "name"),
    template: text(fields.template, "template", true),
    account: fields.account === undefined ? null : text(fields.account, "account", true),
    recipients: [...people.values()],
  };
}

function readRecipient(value: unknown, what: string): Recipient {
  const fields = record(value, what);
  const email = text(fields.email, `${what}.email`, true).trim();
  if (!/^[^\s@]+@[^\s@]+$/.test(email)) throw new CampaignError(`${what}.email is ${JSON.stringify(email)}, must be an address`);
  const given = fields.variables === undefined ? {} : record(fields.variables, `${what}.variables`);
  const variables = Object.fromEntries(
    Object.entries(given).map(([name, each]) => [name, text(each, `${what}.variables.${name}`)]),
  );
  return { email, name: fields.name === undefined ? "" : text(fields.name, `${what}.name`), variables };
}

function record(value: unknown, what: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new CampaignError(`${what} must be an object`);
  return value as Record<string, unknown>;
}

function text(value: unknown, what: string, needed = false): string {
  if (typeof value !== "string" || value.includes("\0") || (needed && value === "")) {
    throw new CampaignError(`${what} must be a ${needed ? "non-empty " : ""}text`);
  }
  return value;
}
