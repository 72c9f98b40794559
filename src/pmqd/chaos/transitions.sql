-- What happens to every job's row, written down by a trigger in the same transaction. For chaos runs only.
-- Plain grants instead of `security definer`: changing the user costs more than the insert, and nothing here is secret.
create schema if not exists pmqd_chaos;

-- No index until the check sorts it; `seq` has no cache, so that it rises with every change of one row.
create table pmqd_chaos.transitions (
  seq            bigint generated always as identity,
  at             timestamptz not null default clock_timestamp(),
  began          timestamptz not null default now(),  -- of the transaction: what the product's statements compare run_at with
  run_at         timestamptz not null,
  job_id         uuid not null,
  old_token      uuid,
  new_token      uuid,
  attempt_count  integer not null,
  interruptions  integer not null,
  max_attempts   integer not null,
  old_status     text,
  new_status     text not null,
  worker_id      text
) with (autovacuum_enabled = false);

-- What jobs that settle themselves have written in the transaction of their end. No key: a second row is what is looked for.
create table pmqd_chaos.effects (
  job_id  uuid not null,
  token   uuid not null,
  at      timestamptz not null default clock_timestamp()
);

create function pmqd_chaos.note_insert() returns trigger
  language plpgsql
as $$
begin
  insert into pmqd_chaos.transitions (run_at, job_id, new_token, attempt_count, interruptions, max_attempts, new_status)
  values (new.run_at, new.id, new.claim_token, new.attempt_count, new.interruptions, new.max_attempts, new.status);
  return null;
end
$$;

create function pmqd_chaos.note_update() returns trigger
  language plpgsql
as $$
begin
  insert into pmqd_chaos.transitions (
    run_at, job_id, old_token, new_token, attempt_count, interruptions, max_attempts, old_status, new_status, worker_id)
  values (
    new.run_at, new.id, old.claim_token, new.claim_token, new.attempt_count, new.interruptions, new.max_attempts, old.status, new.status,
    case when new.status = 'running' then new.worker_id end);
  return null;
end
$$;

-- After the row and without a transition table: so COPY keeps its multi-insert.
create trigger chaos_note_insert after insert on {schema}.jobs
  for each row execute function pmqd_chaos.note_insert();

create trigger chaos_note_update after update of status, claim_token on {schema}.jobs
  for each row when (old.status is distinct from new.status or old.claim_token is distinct from new.claim_token)
  execute function pmqd_chaos.note_update();

grant usage on schema pmqd_chaos to public;
grant insert on pmqd_chaos.transitions, pmqd_chaos.effects to public;
