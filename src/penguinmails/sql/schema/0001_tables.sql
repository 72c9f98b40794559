-- Campaigns, their recipients and deliveries, and what comes back. The placeholders in braces are filled by pmqd.schema.
--
-- No foreign keys: the rows of a campaign are written together, and 100,000 checks of the same parent cost seconds and a lock on it
-- that every other writer of the campaign would meet.

-- An address as suppressions and bounces are looked up by it. Local parts are told apart by case in theory (RFC 5321, 2.4) and nowhere
-- in practice; who has complained as Zoe@ must not be written to as zoe@.
create function {schema}.address_key(address text) returns text
  language sql immutable strict parallel safe
  return lower(address);

create table {schema}.campaigns (
  id           uuid primary key default gen_random_uuid(),
  name         text not null default '',
  template     text not null,
  priority     integer check (priority between 1 and 32767),  -- null: the queue's own
  account      text,                                          -- of sending_accounts; null: the one of the settings
  state        text not null default 'created' check (state in ('created', 'started')),
  created_at   timestamptz not null default now(),
  started_at   timestamptz
);
comment on column {schema}.campaigns.state is
  'created: the list is here, campaign.process has not run; started: there is a delivery for every recipient. Whether all have ended is in campaign_counts.';

-- The list as it was given; campaign.process makes deliveries and jobs of it.
create table {schema}.recipients (
  campaign_id   uuid not null,
  recipient_id  uuid not null default gen_random_uuid(),
  email         text not null check (email <> ''),
  name          text not null default '',
  variables     jsonb not null default '{{}}' check (jsonb_typeof(variables) = 'object'),
  primary key (campaign_id, recipient_id)
);

-- One mail to one recipient of one campaign; apart from the list because it changes some three times, and narrow rows change cheaply.
--
-- queued      not sent; its job will
-- sending     the intent: written and committed before the conversation with the SMTP server begins, by the claim in `attempt_token`
-- sent        the server said yes
-- deferred    surely not sent: the server said later, or was not reached; its job tries again
-- bounced     the server said no, or later for the last time; or a delivery status notification came back
-- complained  a feedback report came back
-- held        an intent without an outcome: the mail may have been sent or not, and a person decides
-- skipped     not to be sent, `reason` says why
--
-- No index names `state`: every change of it would then write every index. What is held is found by campaign_counts.
create table {schema}.deliveries (
  id             uuid primary key,  -- uuid5(campaign_id, recipient_id); the Message-ID is made of it
  campaign_id    uuid not null,
  recipient_id   uuid not null,
  job_id         uuid,              -- of the job that sends it; null: skipped without one
  attempt_token  uuid,              -- the claim of the newest attempt
  created_at     timestamptz not null default now(),
  attempted_at   timestamptz,       -- when the newest intent was written
  sent_at        timestamptz,
  ended_at       timestamptz,       -- when it was bounced, complained about, held or skipped
  attempts       smallint not null default 0,
  smtp_code      smallint,          -- the newest answer's; null: none came
  state          text not null default 'queued'
    check (state in ('queued', 'sending', 'sent', 'deferred', 'bounced', 'complained', 'held', 'skipped')),
  email          text not null,
  account        text,
  worker_id      text,
  message_id     text,
  enhanced_code  text check (enhanced_code ~ '^[245]\.[0-9]{{1,3}}\.[0-9]{{1,3}}$'),  -- RFC 3463
  answer         text,
  reason         text,
  unique (campaign_id, recipient_id)
) with (fillfactor = 60);  -- room for the changes to come in the same page, so that no index is written for them
create index deliveries_email on {schema}.deliveries ({schema}.address_key(email));

-- Sums of deliveries by state, for reports. Kept by triggers (0002), in slots: a transaction adds to the row of its own server process,
-- so that two of them hardly ever wait for one another. A slot alone means nothing and may be negative; the sum over all is exact.
create table {schema}.campaign_counts (
  campaign_id  uuid not null,
  slot         smallint not null,
  state        text not null,
  deliveries   bigint not null,
  primary key (campaign_id, slot, state)
) with (fillfactor = 50);

create view {schema}.campaign_totals as
  select campaign_id, state, sum(deliveries)::bigint as deliveries
    from {schema}.campaign_counts group by campaign_id, state;

-- Who is not written to any more.
create table {schema}.suppressions (
  address     text primary key check (address = {schema}.address_key(address)),
  reason      text not null check (reason in ('hard_bounce', 'soft_bounces', 'complaint', 'unsubscribe', 'manual')),
  source      text not null default '',  -- what told it: a job, a message, a person
  created_at  timestamptz not null default now()
);

-- Each refusal, notification and complaint, once; repeated soft ones of an address are counted here.
create table {schema}.bounces (
  id             uuid primary key,  -- made by who writes it from what it was told by, so that telling it again changes nothing
  delivery_id    uuid,
  address        text not null check (address = {schema}.address_key(address)),
  kind           text not null check (kind in ('hard', 'soft', 'complaint')),
  source         text not null check (source in ('smtp', 'notification', 'feedback')),
  reason         text not null,     -- bounce_codes.Reason: what of it is the address's fault is counted by this
  message_id     uuid,              -- of email_messages; null: the SMTP server itself said so
  smtp_code      smallint,
  enhanced_code  text,
  text           text not null default '',
  occurred_at    timestamptz not null default now()
);
create index bounces_address on {schema}.bounces (address, occurred_at);
create index bounces_delivery on {schema}.bounces (delivery_id) where delivery_id is not null;

-- Inbound mail: each content once, by its SHA-256, and each message once, by Message-ID and content.
create table {schema}.email_contents (
  hash         bytea primary key check (octet_length(hash) = 32),
  size         integer not null,
  raw          bytea not null,
  headers      jsonb not null default '[]',      -- [name, value] in their order
  text         text,
  html         text,
  attachments  jsonb not null default '[]',      -- name, type, size and SHA-256 of each
  defects      text[] not null default '{{}}',   -- what is malformed
  stored_at    timestamptz not null default now()
);

create table {schema}.email_messages (
  id            uuid primary key default gen_random_uuid(),
  message_id    text not null default '',  -- '': the message has none
  content_hash  bytea not null,
  mailbox       text not null default '',  -- where it arrived
  kind          text not null check (kind in ('message', 'reply', 'auto_reply', 'notification', 'feedback', 'malformed')),
  sender        text not null default '',
  recipients    text[] not null default '{{}}',
  subject       text not null default '',
  in_reply_to   text[] not null default '{{}}',  -- In-Reply-To and References, nearest first
  delivery_id   uuid,                        -- the delivery that it answers
  sent_at       timestamptz,                 -- its Date
  received_at   timestamptz not null default now(),
  unique (message_id, content_hash)
);
create index email_messages_delivery on {schema}.email_messages (delivery_id) where delivery_id is not null;

-- Where mails go out, and how many a day while an account is new. Passwords are no business of the database.
create table {schema}.sending_accounts (
  name          text primary key check (name <> ''),
  from_address  text not null,
  is_active     boolean not null default true,
  created_at    timestamptz not null default now()
);

create table {schema}.warmup_ramps (
  account       text primary key,
  start_volume  integer not null check (start_volume > 0),
  growth        double precision not null check (growth >= 1),  -- a day's volume over the day before
  ceiling       integer not null check (ceiling >= start_volume),
  volume        integer not null check (volume > 0),            -- of the coming day
  state         text not null default 'ramping' check (state in ('ramping', 'holding', 'paused', 'finished')),
  time_zone     text not null default 'UTC',
  from_hour     smallint not null default 9 check (from_hour between 0 and 23),
  to_hour       smallint not null default 17 check (to_hour between 1 and 24),
  started_on    date not null default current_date,
  updated_at    timestamptz not null default now(),
  check (from_hour < to_hour)
);

create table {schema}.warmup_days (
  account     text not null,
  day         date not null,
  planned     integer not null check (planned >= 0),
  sent        integer not null default 0,
  bounced     integer not null default 0,
  complained  integer not null default 0,
  received    integer not null default 0,  -- the step `inbound`
  engaged     integer not null default 0,  -- the step `engagement`: opened, answered, moved out of the spam folder
  decision    text check (decision in ('raise', 'hold', 'lower')),  -- made the day after, by these figures
  reason      text,
  planned_at  timestamptz not null default now(),
  primary key (account, day)
);
