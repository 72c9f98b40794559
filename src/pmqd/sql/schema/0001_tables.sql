-- Tables, indexes and the functions their defaults need.
-- The placeholders in braces are filled by schema.py: the schema's name, the three roles, the NOTIFY channel.

-- Limits live in domains, not in CHECK constraints of the table: a domain is checked when a value comes in, a table's
-- CHECK again on every update of the row, so the payload would be printed (and fetched from TOAST) at each mark, claim and settle.
create domain {schema}.queue_label as text collate "C"
  constraint queue_name_form check (
    value ~ '^[A-Za-z0-9][A-Za-z0-9_.:-]{{0,99}}$' and value !~ ':(high|low)$');  -- :high and :low would name another queue's list

create domain {schema}.job_payload as jsonb
  constraint payload_at_most_256_kib check (octet_length(value::text) <= 262144);

-- The smallest UUIDv7 of an instant: the border of a month's partition.
create function {schema}.id_at(moment timestamptz) returns uuid
  language sql immutable strict parallel safe
  return (lpad(to_hex(floor(extract(epoch from moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;

-- UUIDv7 (RFC 9562, method 3): 48 bits of milliseconds, 12 bits of their fraction in rand_a, so that ids made one after the other sort.
-- PostgreSQL 18 has its own, which is also strictly rising within a session.
do $do$
begin
  if to_regprocedure('pg_catalog.uuidv7()') is not null then
    create function {schema}.new_id() returns uuid
      language sql volatile parallel safe
      return pg_catalog.uuidv7();
  else
    create function {schema}.new_id() returns uuid
      language plpgsql volatile parallel safe
    as $body$
    declare
      micros constant bigint := floor(extract(epoch from clock_timestamp()) * 1000000);
    begin
      return encode(
        substring(int8send(micros / 1000) from 3)
        || substring(int4send((28672 + ((micros % 1000) * 4096) / 1000)::int) from 3)  -- 28672 = version 7 in the upper four bits
        || substring(uuid_send(gen_random_uuid()) from 9), 'hex')::uuid;               -- its variant bits are the right ones already
    end
    $body$;
  end if;
end
$do$;

create table {schema}.job_queues (
  name                {schema}.queue_label primary key,
  default_priority    integer check (default_priority between 1 and 32767),
  max_attempts        integer check (max_attempts between 1 and 1000),
  timeout_seconds     double precision check (timeout_seconds > 0),
  retry_base_seconds  double precision check (retry_base_seconds >= 0),
  retry_max_seconds   double precision check (retry_max_seconds >= 0),
  is_active           boolean not null default true,
  paused_at           timestamptz,
  created_at          timestamptz not null default now(),
  updated_at          timestamptz not null default now()
);
comment on table {schema}.job_queues is
  'One row per queue, made by the migrator when a queue appears. Null settings: the built-in default. Not active: paused.';

-- Fixed-width columns first: PostgreSQL then reaches them without walking over the payload.
create table {schema}.jobs (
  id                  uuid not null default {schema}.new_id(),
  run_at              timestamptz not null default now(),
  created_at          timestamptz not null default now(),
  updated_at          timestamptz not null default now(),
  priority            integer not null default 100,
  attempt_count       integer not null default 0,
  interruptions       integer not null default 0,
  max_attempts        integer not null default 3,
  ready               boolean not null default true,   -- waiting for a claim: queued or marked, due or not
  alone               boolean not null default false,  -- run with nothing else in the process: it was in a crash
  cancel_requested    boolean not null default false,
  queue_name          {schema}.queue_label not null,
  status              text not null default 'queued',
  kind                text,
  payload             {schema}.job_payload not null,
  tags                text[] not null default array[]::text[],
  claim_token         uuid,  -- stays after the settle, so that an unanswered settle can be looked up
  worker_id           text,
  started_at          timestamptz,
  completed_at        timestamptz,
  failed_at           timestamptz,
  cancelled_at        timestamptz,
  last_error_message  text,
  result              jsonb,
  primary key (id) with (fillfactor = 45),  -- the claim adds a second entry to each: room for it, so that no page splits
  -- Each update of a row evaluates all of these, and each statement reads them from their text first: few, and short.
  constraint priority_range check (priority between 1 and 32767),
  constraint interruptions_bounded check (interruptions between 0 and 5),
  -- Who is ready has an attempt left.
  constraint attempts_bounded check (
    max_attempts between 1 and 1000 and attempt_count between 0 and max_attempts - ready::integer),
  -- What producers write must be readable by every client: 'infinity' and years beyond 9999 are no time in most languages.
  constraint times_readable check (
    least(run_at, created_at) >= '0001-01-02 00:00:00+00' and greatest(run_at, created_at) < '9999-12-31 00:00:00+00'),
  -- Ready means waiting for a claim; who runs has an owner; who has ended has that end's time and no other.
  constraint status_fits check (
    case when ready then status in ('queued', 'migrated_to_redis') and coalesce(completed_at, failed_at, cancelled_at) is null
      else case status
        when 'running' then claim_token is not null and worker_id is not null and coalesce(completed_at, failed_at, cancelled_at) is null
        when 'completed' then completed_at is not null and coalesce(failed_at, cancelled_at) is null
        when 'failed' then failed_at is not null and coalesce(completed_at, cancelled_at) is null
        when 'cancelled' then cancelled_at is not null and coalesce(completed_at, failed_at) is null
        else false end end)
) partition by range (id);
comment on table {schema}.jobs is
  'Every job, one row each. `insert into jobs (queue_name, payload) values (...)` is a whole enqueue.';

-- An index whose key or predicate changes costs an entry in every index of the row. `ready` changes only in the claim and when a job comes
-- back; `status` is in no index. So mark and settle stay heap-only.

-- mark(), steal(), pulse(), marked.sql, depths.sql: due rows of one queue in order, one probe per distinct priority.
create index jobs_ready on {schema}.jobs (queue_name, priority, run_at, id) where ready;

-- list_failed.sql, replay.sql, depths.sql: the dead letters of one queue, newest first.
create index jobs_failed on {schema}.jobs (queue_name, failed_at) where failed_at is not null;

-- beat(): the running jobs somebody wants cancelled; nearly always empty.
create index jobs_cancel on {schema}.jobs (id) where cancel_requested;

-- Ids that are no UUIDv7 of a month with a partition of its own. The reasons for the storage settings are at make_partition().
create table {schema}.jobs_default partition of {schema}.jobs default
  with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

create sequence {schema}.job_logs_id as bigint;

create table {schema}.job_logs (
  id              bigint not null default nextval('{schema}.job_logs_id'),
  created         timestamptz not null default now(),
  job_id          uuid not null,
  attempt_number  integer not null,
  started         timestamptz,
  finished        timestamptz,
  duration        double precision,  -- seconds
  status          text not null check (status in ('success', 'retry', 'failed', 'released', 'cancelled', 'crashed')),
  worker_id       text,
  log_message     text
) partition by range (created);
comment on table {schema}.job_logs is 'One row per attempt or interruption; never changed.';

-- show_job.sql, settled_ids.sql: the attempts of one job.
create index job_logs_job on {schema}.job_logs (job_id);

create table {schema}.job_logs_default partition of {schema}.job_logs default
  with (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

-- One row per live instance: its lease. Renewed while tick - lease_tick <= 30, claims while <= 25, taken over from when > 31.
create table {schema}.instances (
  id          uuid primary key,
  host        text not null,
  pid         integer not null,
  started_at  timestamptz not null default now(),
  beat_at     timestamptz not null default now(),  -- for people; the lease is counted in ticks
  lease_tick  bigint not null,
  queues      text[] not null default array[]::text[],
  kinds       text[] not null default array[]::text[],
  pools       jsonb not null default '{{}}'
) with (fillfactor = 50);

-- One row per claimed batch, from the claim until all its jobs are settled or rescued: how rescue finds what a worker held.
-- Every second somebody reads all of it, and every batch makes and deletes a row: vacuumed early and without pauses.
create table {schema}.claims (
  token        uuid primary key,
  instance_id  uuid not null,
  claimed_at   timestamptz not null default now(),
  worker_id    text not null,
  ids          uuid[] not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
        autovacuum_vacuum_insert_threshold = -1);
alter table {schema}.claims alter column ids set storage external;  -- random ids do not compress

-- Who migrates. `term` guards the leader's writes; `redis_epoch` names the life of Redis that the marks belong to.
create table {schema}.leader (
  one          boolean primary key default true check (one),
  term         bigint not null default 0,
  beat_tick    bigint not null default 0,  -- the leader's last sign of life
  holder       text,
  redis_epoch  uuid not null default gen_random_uuid(),
  awake_until  timestamptz not null default '-infinity'  -- until then inserts need not notify
) with (fillfactor = 50);
insert into {schema}.leader default values;

-- The lease clock: a counter that moves only while PostgreSQL is writable, and the last pulse. Beside it, which life of PostgreSQL the
-- claims belong to, and the tick from which claims are allowed again after that changed.
create table {schema}.ticker (
  one          boolean primary key default true check (one),
  tick         bigint not null default 0,
  holder       uuid,
  cluster      bigint not null default 0,
  timeline     integer not null default 0,  -- 0: not known
  claims_from  bigint not null default 0,
  pulse        jsonb not null default '[]'
) with (fillfactor = 50);
insert into {schema}.ticker default values;

-- Where the slow walk through jobs_default (retention) has come to.
create table {schema}.retention (
  one     boolean primary key default true check (one),
  cursor  uuid not null default '00000000-0000-0000-0000-000000000000'
) with (fillfactor = 50);
insert into {schema}.retention default values;
