-- Months of jobs and job_logs. As their owner, so that the daemon's role needs no right to change tables; each call is one short transaction.

create function {schema}.partition_name(p_parent text, p_month date) returns text
  language sql immutable strict parallel safe
  return p_parent || to_char(p_month, '_YYYY_MM');

-- The month's borders, written as literals of the parent's key.
create function {schema}.partition_border(p_parent text, p_month date) returns text
  language sql immutable strict parallel safe
  return case p_parent
    when 'jobs' then quote_literal({schema}.id_at(p_month::timestamp at time zone 'utc'))
    else quote_literal(p_month::text || ' 00:00:00+00') end;

create function {schema}.partition_condition(p_parent text, p_month date) returns text
  language sql immutable strict parallel safe
  return format('(%1$s >= %2$s and %1$s < %3$s)', case p_parent when 'jobs' then 'id' else 'created' end,
    {schema}.partition_border(p_parent, p_month), {schema}.partition_border(p_parent, (p_month + interval '1 month')::date));

-- Builds a month aside; attaching comes later.
-- fillfactor 50: a row lives through three or four versions; room on its page keeps mark and settle heap-only (2 x the rate, measured).
-- autovacuum: every job leaves dead versions on its page and dead entries at the head of jobs_ready, where every probe begins. The default
-- of 20 % of a month's table would let a million gather. Insert-driven vacuums keep what is finished all-visible and frozen.
create function {schema}.make_partition(p_parent text, p_month date) returns void
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_parent not in ('jobs', 'job_logs') then
    raise exception 'no partitions for %', p_parent;
  end if;
  execute format('create table if not exists {schema}.%I (like {schema}.%I including all) with (%s)',
    {schema}.partition_name(p_parent, p_month), p_parent,
    case p_parent when 'jobs' then
      'fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000, '
      'autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05'
    else
      'autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05' end);
end
$$;

-- Rows of the month in the default partition, counted up to p_most.
create function {schema}.count_in_default(p_parent text, p_month date, p_most integer) returns integer
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  amount integer;
begin
  execute format('select count(*) from (select from {schema}.%I where %s limit %s) r',
    p_parent || '_default', {schema}.partition_condition(p_parent, p_month), p_most) into amount;
  return amount;
end
$$;

-- For a large default partition: a CHECK that excludes the month, first unvalidated (an instant), then validated (a scan that blocks
-- nobody), so that attaching need not scan under its exclusive lock. Only for months to come: until the month is attached, a row of it
-- is refused. Whoever dies between the two calls leaves the CHECK behind; the next round attaches.
create function {schema}.hold_off_default(p_parent text, p_month date) returns void
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  hold constant text := 'hold_' || {schema}.partition_name(p_parent, p_month);
begin
  if not exists (select from pg_constraint where conname = hold and conrelid = format('{schema}.%I', p_parent || '_default')::regclass) then
    execute format('alter table {schema}.%I add constraint %I check (not %s) not valid',
      p_parent || '_default', hold, {schema}.partition_condition(p_parent, p_month));
  end if;
end
$$;

create function {schema}.validate_hold(p_parent text, p_month date) returns void
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  execute format('alter table {schema}.%I validate constraint %I',
    p_parent || '_default', 'hold_' || {schema}.partition_name(p_parent, p_month));
end
$$;

-- Moves the month's rows out of the default partition and attaches the month, in one transaction: no row is ever out of sight.
create function {schema}.attach_partition(p_parent text, p_month date) returns integer
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  home constant text := p_parent || '_default';
  month constant text := {schema}.partition_name(p_parent, p_month);
  moved integer;
begin
  execute format('lock table {schema}.%I in access exclusive mode', home);
  execute format('with gone as (delete from {schema}.%I where %s returning *) insert into {schema}.%I select * from gone',
    home, {schema}.partition_condition(p_parent, p_month), month);
  get diagnostics moved = row_count;
  execute format('alter table {schema}.%I attach partition {schema}.%I for values from (%s) to (%s)', p_parent, month,
    {schema}.partition_border(p_parent, p_month), {schema}.partition_border(p_parent, (p_month + interval '1 month')::date));
  execute format('alter table {schema}.%I drop constraint if exists %I', home, 'hold_' || month);
  return moved;
end
$$;

-- Drops a month. What must outlive it (unfinished jobs, ended ones whose time has not come: p_keep, seen before without a lock; those ready
-- or claimed again meanwhile: looked up here, through small indexes) moves to the default partition. Not CONCURRENTLY: PostgreSQL refuses
-- that where a default partition exists; nothing here reads the month as a whole, so the lock is short.
create function {schema}.retire_partition(p_parent text, p_month date, p_keep uuid[]) returns integer
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  month constant text := {schema}.partition_name(p_parent, p_month);
  moved integer := 0;
begin
  execute format('lock table {schema}.%I in access exclusive mode', p_parent);
  execute format('alter table {schema}.%I detach partition {schema}.%I', p_parent, month);
  if p_parent = 'jobs' then
    execute format(
      'insert into {schema}.jobs_default select m.* from {schema}.%1$I m where m.id = any(array('
      'select r.id from {schema}.%1$I r where r.ready union select unnest($1) union select unnest(c.ids) from {schema}.claims c))',
      month) using p_keep;
    get diagnostics moved = row_count;
  end if;
  execute format('drop table {schema}.%I', month);
  return moved;
end
$$;

-- The months that exist, as they stand in the catalogue. A condition on `month` may be tried before that on the name, hence the case.
create view {schema}.partitions as
  select p.relname::text as parent,
         case when c.relname ~ '_[0-9]{{4}}_[0-9]{{2}}$' then to_date(right(c.relname, 7), 'YYYY_MM') end as month
  from pg_catalog.pg_inherits i
  join pg_catalog.pg_class c on c.oid = i.inhrelid
  join pg_catalog.pg_class p on p.oid = i.inhparent
  where p.oid in ('{schema}.jobs'::regclass, '{schema}.job_logs'::regclass)
    and c.relname ~ ('^' || p.relname || '_[0-9]{{4}}_[0-9]{{2}}$');

-- This month and the next two, so that nothing has to be moved later. Afterwards maintenance keeps two months ahead.
do $do$
declare
  parent text;
  month date;
begin
  foreach parent in array array['jobs', 'job_logs'] loop
    for ahead in 0 .. 2 loop
      month := (date_trunc('month', now() at time zone 'utc') + make_interval(months => ahead))::date;
      perform {schema}.make_partition(parent, month);
      perform {schema}.attach_partition(parent, month);
    end loop;
  end loop;
end
$do$;
