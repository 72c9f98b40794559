-- Enqueue, wake, and the three statements of the protocol that need a loop: mark, steal, beat.

-- Wakes the migrator if it sleeps. NOTIFY takes a database-wide lock at commit, so nobody notifies while it is awake.
-- As its owner: whoever may insert need not read `leader`.
create function {schema}.wake() returns void
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from {schema}.leader where awake_until < clock_timestamp()) then
    perform pg_notify({channel}, '');
  end if;
end
$$;

create function {schema}.wake_after_insert() returns trigger
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform {schema}.wake();
  return null;
end
$$;

-- Per statement and without a transition table: one would end COPY's multi-insert.
create trigger wake_after_insert after insert on {schema}.jobs
  for each statement execute function {schema}.wake_after_insert();

create function {schema}.enqueue(
    queue_name text, payload jsonb, kind text default null, priority integer default null, run_at timestamptz default null,
    max_attempts integer default null, tags text[] default null, id uuid default null)
  returns uuid
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  job_id constant uuid := coalesce(enqueue.id, {schema}.new_id());
begin
  insert into {schema}.jobs (id, queue_name, payload, kind, priority, run_at, max_attempts, tags)
  select job_id, enqueue.queue_name, enqueue.payload, enqueue.kind,
         coalesce(enqueue.priority, q.default_priority, 100), coalesce(enqueue.run_at, now()),
         coalesce(enqueue.max_attempts, q.max_attempts, 3), coalesce(enqueue.tags, array[]::text[])
  from (select) as one left join {schema}.job_queues q on q.name = enqueue.queue_name
  on conflict do nothing;  -- the caller repeats an enqueue whose answer was lost
  return job_id;
end
$$;
comment on function {schema}.enqueue is
  'Adds a job in the caller''s transaction. Null arguments: the queue''s default, else priority 100, 3 attempts, now. With an id it may be repeated.';

-- What a job becomes when an attempt ends so. Attempts used up or the sixth interruption: here, so that no caller can go beyond.
create function {schema}.status_after(
    action text, cancel_requested boolean, attempt_count integer, max_attempts integer, interruptions integer)
  returns text language sql immutable parallel safe
  return case
    when action = 'complete' then 'completed'
    when action = 'cancel' then 'cancelled'
    when action = 'fail' then 'failed'
    when cancel_requested then 'cancelled'
    when action = 'retry' and attempt_count >= max_attempts then 'failed'
    when action = 'interrupt' and interruptions >= 5 and attempt_count >= max_attempts then 'failed'
    else 'queued'
  end;

-- Whether the attempt is given back: user code did not run, or was cut by something that was not its fault (five times a life).
create function {schema}.is_refunded(action text, interruptions integer)
  returns boolean language sql immutable parallel safe
  return action in ('release', 'snooze') or (action = 'interrupt' and interruptions < 5);

-- Which PostgreSQL this is: the number of the cluster, and its timeline, which each promotion of a standby raises; 0 where that cannot be
-- told (on a standby, in services without these functions). Not pg_control_checkpoint(): that tells the timeline of the last
-- checkpoint, which may be the old one for a while after a promotion.
create function {schema}.timeline() returns integer
  language plpgsql volatile
as $$
begin
  return ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer;
exception when others then
  return 0;
end
$$;

create function {schema}.cluster() returns bigint
  language plpgsql volatile
as $$
begin
  return (select system_identifier from pg_control_system());
exception when others then
  return 0;
end
$$;

-- Planner settings of mark, steal and pulse: their probes are right only as ordered index scans, and a table that was never analyzed
-- (or has just grown) would tempt the planner to sort everything that is ready.

-- Marks due rows, per room (queue, priorities from low to high, at most limit; in all at most p_most), in order. Answers with one row for
-- each room that got any: its place among the rooms, the ids in order, the kinds and how many of each, and where the last one stands.
-- One statement finds the rooms that hold anything at all: most looks find nothing. Then one probe per distinct priority: rows due later are
-- never walked over. Ids first, then an update by value: partitions are pruned. Generic plans: planning would cost more than all of it.
-- p_after_*: begin behind this row of the room. What stands before it are marked rows, and the entries of claimed ones until the next vacuum,
-- hundreds of pages in a large drain. If the room is not filled so, all of it is looked at after all. Otherwise what was committed or
-- given back late waits for the next call without a row to begin behind.
create function {schema}.mark_ids(
    p_term bigint, p_queues text[], p_lows integer[], p_highs integer[], p_limits integer[], p_most integer,
    p_after_priorities integer[] default null, p_after_times timestamptz[] default null, p_after_ids uuid[] default null)
  returns table (place integer, ids uuid[], kinds text[], numbers bigint[], last_priority integer, last_run_at timestamptz)
  language plpgsql
  set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  room record;
  bounded boolean;
  at_priority integer;
  next_priority integer;
  after_time timestamptz;
  after_id uuid;
  found_ids uuid[];
  found_time timestamptz;
  chosen uuid[];
  space integer;
  most integer := p_most;
  lowest uuid;
  highest uuid;
begin
  if not exists (select from {schema}.leader where term = p_term) then
    raise exception 'term % has ended', p_term using errcode = 'PMQ01';
  end if;
  for room in
    select r.place, r.queue_name, r.high, r.most, r.after_priority, r.after_time, r.after_id,
           coalesce(head.priority, r.after_priority) as priority
    from unnest(p_queues, p_lows, p_highs, p_limits, p_after_priorities, p_after_times, p_after_ids) with ordinality
           as r(queue_name, low, high, most, after_priority, after_time, after_id, place)
      left join lateral (
        select j.priority from {schema}.jobs j
        where j.ready and j.queue_name = r.queue_name and j.priority >= r.low and j.priority <= least(r.high, r.after_priority - 1)
        order by j.queue_name, j.priority limit 1) head on true
    where head.priority is not null or r.after_priority is not null
  loop
    continue when exists (select from {schema}.job_queues q where q.name = room.queue_name and not q.is_active);
    bounded := room.after_priority is not null;
    loop
      chosen := array[]::uuid[];
      space := least(room.most, most);
      at_priority := room.priority;
      while space > 0 loop
        after_time := '-infinity';
        after_id := '00000000-0000-0000-0000-000000000000';
        if bounded and at_priority = room.after_priority then
          after_time := room.after_time;
          after_id := room.after_id;
        end if;
        select array_agg(f.id), max(f.run_at) into found_ids, found_time
          from (
            select j.id, j.run_at from {schema}.jobs j
            where j.ready and j.queue_name = room.queue_name and j.priority = at_priority and j.run_at <= now() and j.status = 'queued'
              and (j.run_at, j.id) > (after_time, after_id)
            order by j.run_at, j.id limit space for update skip locked) f;
        if found_ids is not null then
          chosen := chosen || found_ids;
          space := space - cardinality(found_ids);
          last_priority := at_priority;
          last_run_at := found_time;
        end if;
        exit when space = 0;
        select j.priority into next_priority from {schema}.jobs j
          where j.ready and j.queue_name = room.queue_name and j.priority > at_priority
            and j.priority <= case when bounded and at_priority < room.after_priority then room.after_priority - 1 else room.high end
          order by j.queue_name, j.priority limit 1;
        if not found then
          exit when not bounded or at_priority >= room.after_priority;
          next_priority := room.after_priority;
        end if;
        at_priority := next_priority;
      end loop;
      exit when space <= 0 or not bounded;
      bounded := false;
    end loop;
    continue when cardinality(chosen) = 0;
    most := most - cardinality(chosen);
    -- A lost mark is made again: it need not wait for the disk. Local to this transaction: a SET would leak through a pooler.
    perform set_config('synchronous_commit', 'off', true);
    select c into lowest from unnest(chosen) c order by c limit 1;
    select c into highest from unnest(chosen) c order by c desc limit 1;
    -- All are locked, so all are updated: nothing but their kinds need come back.
    with marked as (
      update {schema}.jobs j set status = 'migrated_to_redis', updated_at = now()
      where j.id = any(chosen) and j.id between lowest and highest and j.status = 'queued'
      returning j.kind),
    counted as (select m.kind, count(*) as number from marked m group by m.kind)
    select array_agg(c.kind), array_agg(c.number) into kinds, numbers from counted c;
    place := room.place;
    ids := chosen;
    return next;
    exit when most = 0;
  end loop;
end
$$;

-- Marks as mark_ids() does, and answers with one row for each job, in order; p_full: with the whole item.
create function {schema}.mark(
    p_term bigint, p_queues text[], p_lows integer[], p_highs integer[], p_limits integer[], p_most integer, p_full boolean)
  returns table (id uuid, queue_name text, kind text, priority integer, run_at timestamptz, item text)
  language plpgsql
  set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
  chosen uuid[];
  lowest uuid;
  highest uuid;
begin
  chosen := array(select unnest(m.ids) from {schema}.mark_ids(p_term, p_queues, p_lows, p_highs, p_limits, p_most) m);
  select c into lowest from unnest(chosen) c order by c limit 1;
  select c into highest from unnest(chosen) c order by c desc limit 1;
  return query
    select j.id, j.queue_name::text, j.kind, j.priority, j.run_at,
      case when p_full then json_build_object(
        'id', j.id, 'queue_name', j.queue_name, 'priority', j.priority, 'payload', j.payload, 'created_at', j.created_at,
        'attempt_count', j.attempt_count, 'max_attempts', j.max_attempts)::text end
    from {schema}.jobs j
    where j.id = any(chosen) and j.id between lowest and highest
    order by j.priority, j.run_at, j.id;
end
$$;

-- Claims without a hint: the best ready or marked rows of the given stretches (queue, low, high), in their order.
-- The same guards as in claim.sql: queue not paused, lease with five ticks to spare, the life of PostgreSQL that the ticker knows.
-- p_marked: marked rows too; without them hints stay good. p_hinted: marked rows whose hints the worker has, beside p_limit that are not marked. p_after_*: begin behind this row of that stretch, as in mark_ids(), and for the same reason.
create function {schema}.steal(
    p_queues text[], p_lows integer[], p_highs integer[], p_limit integer, p_marked boolean, p_token uuid, p_worker text, p_instance uuid,
    p_after_stretch integer default null, p_after_priority integer default null, p_after_time timestamptz default null,
    p_after_id uuid default null, p_hinted uuid[] default null)
  returns table (id uuid, queue_name text, kind text, priority integer, payload jsonb, attempt_count integer, interruptions integer,
                 max_attempts integer, run_at timestamptz, created_at timestamptz, tags text[], alone boolean, claimed_at timestamptz)
  language plpgsql
  set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off set plan_cache_mode = force_generic_plan
  set enable_nestloop = off
as $$
#variable_conflict use_column
declare
  stretch record;
  chosen uuid[] := array[]::uuid[];
  most integer := p_limit;
  marked boolean := p_marked and p_hinted is null;  -- else what is won by its hint would be found again, and be there twice
  earlier uuid[];
  found_ids uuid[];
  bounded boolean;
  at_priority integer;
  next_priority integer;
  after_time timestamptz;
  after_id uuid;
  space integer;
  lowest uuid;
  highest uuid;
begin
  if not exists (
      select from {schema}.instances i, {schema}.ticker t
      where i.id = p_instance and t.tick - i.lease_tick <= 25 and t.tick >= t.claims_from and t.timeline in (0, {schema}.timeline())) then
    return;
  end if;
  if p_hinted is not null then
    select h into lowest from unnest(p_hinted) h order by h limit 1;
    select h into highest from unnest(p_hinted) h order by h desc limit 1;
    chosen := array(
      select j.id from {schema}.jobs j
      where j.id = any(p_hinted) and j.id between lowest and highest and j.status = 'migrated_to_redis' and j.run_at <= now()
        and j.queue_name = any(p_queues) and j.queue_name <> all (array(select q.name::text from {schema}.job_queues q where not q.is_active))
      order by j.priority, j.run_at, j.id for update skip locked);
    most := p_limit + cardinality(chosen);
  end if;
  for stretch in
    -- Those with something in them, found out in one statement. The heads are subqueries, since a join would not be looked up row by row here.
    select s.place, s.queue_name, s.high, coalesce(s.head, p_after_priority) as priority
    from (
      select r.*, (
          select j.priority from {schema}.jobs j
          where j.ready and j.queue_name = r.queue_name and j.priority >= r.low
            and j.priority <= case when r.place = p_after_stretch then p_after_priority - 1 else r.high end
          order by j.queue_name, j.priority limit 1) as head
      from unnest(p_queues, p_lows, p_highs) with ordinality as r(queue_name, low, high, place)) s
    where s.head is not null or s.place = p_after_stretch
  loop
    exit when cardinality(chosen) >= most;
    continue when exists (select from {schema}.job_queues q where q.name = stretch.queue_name and not q.is_active);
    bounded := coalesce(stretch.place = p_after_stretch, false);
    earlier := chosen;
    loop
      chosen := earlier;
      space := most - cardinality(chosen);
      at_priority := stretch.priority;
      while space > 0 loop
        after_time := '-infinity';
        after_id := '00000000-0000-0000-0000-000000000000';
        if bounded and at_priority = p_after_priority then
          after_time := p_after_time;
          after_id := p_after_id;
        end if;
        found_ids := array(
          select j.id from {schema}.jobs j
          where j.ready and j.queue_name = stretch.queue_name and j.priority = at_priority and j.run_at <= now()
            and (j.run_at, j.id) > (after_time, after_id) and (marked or j.status = 'queued')
          order by j.run_at, j.id limit space for update skip locked);
        chosen := chosen || found_ids;
        space := space - cardinality(found_ids);
        exit when space <= 0;
        select j.priority into next_priority from {schema}.jobs j
          where j.ready and j.queue_name = stretch.queue_name and j.priority > at_priority
            and j.priority <= case when bounded and at_priority < p_after_priority then p_after_priority - 1 else stretch.high end
          order by j.queue_name, j.priority limit 1;
        if not found then
          exit when not bounded or at_priority >= p_after_priority;
          next_priority := p_after_priority;
        end if;
        at_priority := next_priority;
      end loop;
      exit when space <= 0 or not bounded;
      bounded := false;
    end loop;
  end loop;
  if cardinality(chosen) = 0 then
    return;
  end if;
  insert into {schema}.claims (token, worker_id, instance_id, ids) values (p_token, p_worker, p_instance, chosen);
  select c into lowest from unnest(chosen) c order by c limit 1;
  select c into highest from unnest(chosen) c order by c desc limit 1;
  return query
    with won as (
      update {schema}.jobs j
      set status = 'running', ready = false, attempt_count = j.attempt_count + 1, claim_token = p_token, worker_id = p_worker,
          started_at = now(), updated_at = now()
      where j.id = any(chosen) and j.id between lowest and highest and j.status in ('queued', 'migrated_to_redis')
      returning j.id, j.queue_name, j.kind, j.priority, j.payload, j.attempt_count, j.interruptions, j.max_attempts, j.run_at,
                j.created_at, j.tags, j.alone)
    select w.id, w.queue_name::text, w.kind, w.priority, w.payload::jsonb, w.attempt_count, w.interruptions, w.max_attempts,
           w.run_at, w.created_at, w.tags, w.alone, now()
    from won w join unnest(chosen) with ordinality as c(id, place) on c.id = w.id
    order by c.place;
end
$$;

-- What waits, per queue: one small answer for every instance. Times as seconds since 1970 on this server's clock.
create function {schema}.pulse() returns jsonb
  language plpgsql stable
  set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
declare
  answer jsonb := '[]';
  queue text := '';
  at_priority integer;
  probes integer;
  head record;
  coming timestamptz;
  oldest timestamptz;
  next_due timestamptz;
  old_marks boolean;
begin
  loop
    select j.queue_name into queue from {schema}.jobs j where j.ready and j.queue_name > queue order by j.queue_name limit 1;
    exit when not found;
    at_priority := 0;
    probes := 0;
    oldest := null;
    next_due := null;
    old_marks := false;
    loop
      select j.priority into at_priority from {schema}.jobs j
        where j.ready and j.queue_name = queue and j.priority > at_priority order by j.queue_name, j.priority limit 1;
      exit when not found;
      probes := probes + 1;
      if probes > 200 then  -- hundreds of priorities with nothing but future rows: rather a look too many than a second of probing
        oldest := coalesce(oldest, now());
        exit;
      end if;
      -- A lost hint soon stands at the head: the rows around it are claimed, it is not.
      select min(h.run_at) as run_at, bool_or(h.status = 'migrated_to_redis' and h.updated_at < now() - interval '5 s') as old into head
      from (select j.run_at, j.status, j.updated_at from {schema}.jobs j
            where j.ready and j.queue_name = queue and j.priority = at_priority and j.run_at <= now()
            order by j.run_at, j.id limit 20) h;
      oldest := least(oldest, head.run_at);
      old_marks := old_marks or coalesce(head.old, false);
      select j.run_at into coming from {schema}.jobs j
        where j.ready and j.queue_name = queue and j.priority = at_priority and j.run_at > now() order by j.run_at, j.id limit 1;
      next_due := least(next_due, coming);
    end loop;
    answer := answer || jsonb_build_object(
      'queue_name', queue,
      'ready', oldest is not null and not exists (select from {schema}.job_queues q where q.name = queue and not q.is_active),
      'served', exists (select from {schema}.instances i, {schema}.ticker t where queue = any(i.queues) and t.tick - i.lease_tick <= 30),
      'due_at', extract(epoch from next_due),
      'oldest_at', extract(epoch from oldest),
      'old_marks', old_marks);
  end loop;
  return answer;
end
$$;

-- Once a second, by every instance: renews its lease, advances the tick if it is the one to do so, and tells what is to be done.
-- p_holding: the caller was the ticker; p_stalled: the tick that it has seen unchanged for two seconds. A ticker whose instance is
-- gone is succeeded at once. Two tickers cannot be: the loser's update no longer finds its condition.
-- The first beat on another timeline (a promoted standby, a restored backup) forbids claims for one lease: the last claims may be lost, and
-- who runs those jobs must have taken them again by then, or have stopped. p_lossless: no commit can be lost so.
create function {schema}.beat(p_instance uuid, p_holding boolean, p_stalled bigint, p_lossless boolean)
  returns table (lost boolean, ticking boolean, tick bigint, claim_workers text[], cancel_ids uuid[], cancel_tokens uuid[],
                 orphans boolean, pulse jsonb, now_epoch double precision, claims_in bigint, claim_tokens uuid[])
  language plpgsql
  set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
  this_cluster constant bigint := {schema}.cluster();
  this_timeline constant integer := {schema}.timeline();
begin
  update {schema}.ticker t
    set cluster = this_cluster, timeline = this_timeline,
        claims_from = case when t.timeline = 0 or p_lossless then t.claims_from else t.tick + 30 end
    where this_timeline <> 0 and (t.cluster, t.timeline) <> (this_cluster, this_timeline);
  -- Two ticks are never closer than a second, whoever makes them: a self-fence counts on it. So succeeding a ticker is no tick.
  update {schema}.ticker t
    set tick = t.tick + (t.holder is null or (p_holding and t.holder = p_instance) or t.tick is not distinct from p_stalled)::int,
        holder = p_instance
    where (p_holding and t.holder = p_instance) or t.tick = p_stalled
       or not exists (select from {schema}.instances i where i.id = t.holder)
    returning t.tick into tick;
  ticking := found;
  if not ticking then
    select t.tick, t.pulse into tick, pulse from {schema}.ticker t;
  end if;
  update {schema}.instances i set lease_tick = beat.tick, beat_at = now() where i.id = p_instance and beat.tick - i.lease_tick <= 30;
  lost := not found;
  if ticking then
    pulse := {schema}.pulse();
    update {schema}.ticker t set pulse = beat.pulse where t.pulse is distinct from beat.pulse;
  end if;
  select coalesce(array_agg(c.worker_id order by c.token), array[]::text[]), coalesce(array_agg(c.token order by c.token), array[]::uuid[])
    into claim_workers, claim_tokens
    from {schema}.claims c where c.instance_id = p_instance;
  select coalesce(array_agg(j.id), array[]::uuid[]), coalesce(array_agg(j.claim_token), array[]::uuid[])
    into cancel_ids, cancel_tokens
    from {schema}.jobs j where j.cancel_requested and j.status = 'running' and j.claim_token = any(claim_tokens);
  orphans := exists (
    select from {schema}.claims c left join {schema}.instances i on i.id = c.instance_id
    where i.id is null or beat.tick - i.lease_tick > 31)
    or exists (select from {schema}.instances i where beat.tick - i.lease_tick > 31);  -- it held nothing: to be forgotten
  now_epoch := extract(epoch from clock_timestamp());
  select greatest(t.claims_from - t.tick, 0) into claims_in from {schema}.ticker t;
  return next;
end
$$;
