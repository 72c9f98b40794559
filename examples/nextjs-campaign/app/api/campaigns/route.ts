// POST /api/campaigns: starts a campaign. A route handler of Next.js's App Router; it uses nothing but the web's Request and Response.

import { createHash, randomUUID, timingSafeEqual } from "node:crypto";
import { CampaignError, readCampaign, startCampaign } from "../../../lib/campaigns.js";
import { inTransaction } from "../../../lib/db.js";

export const runtime = "nodejs"; // `pg` opens sockets, which the edge runtime does not have

export async function POST(request: Request): Promise<Response> {
  if (!isAllowed(request.headers.get("authorization"))) return refuse(401, "unauthorized");
  try {
    const body: unknown = await request.json();
    const campaign = readCampaign(body, randomUUID);
    const isNew = await inTransaction((client) => startCampaign(client, campaign));
    return Response.json({ id: campaign.id, recipients: campaign.recipients.length, is_new: isNew }, { status: 202 });
  } catch (error) {
    if (error instanceof CampaignError) return refuse(400, error.message);
    if (error instanceof SyntaxError) return refuse(400, "the body must be JSON");
    console.error("a campaign could not be started:", error); // nothing was written, or its id makes a repetition safe
    return refuse(503, "try again");
  }
}

/** Whoever starts a campaign writes to thousands of people: without CAMPAIGNS_TOKEN nobody may. */
function isAllowed(header: string | null): boolean {
  const token = process.env.CAMPAIGNS_TOKEN;
  if (!token || !header) return false;
  const digest = (value: string) => createHash("sha256").update(value).digest();
  return timingSafeEqual(digest(header), digest(`Bearer ${token}`));
}

function refuse(status: number, message: string): Response {
  return Response.json({ error: message }, { status });
}
