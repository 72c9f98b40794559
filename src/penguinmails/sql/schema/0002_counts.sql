-- Keeps campaign_counts equal to deliveries, in the transaction that changes them, whoever does it.
--
-- Once per statement, not per row: 100,000 deliveries that come by COPY, or are released together, are one addition.
-- The slot is that of the server process. Two transactions that are open at once are in two processes, so they wait for each other only
-- where their numbers are equal modulo 64, and then for one commit. (One row per campaign would have every worker wait for every other's
-- commit; deltas that are only inserted would need somebody who folds them, and a report that reads what is not folded yet.)
-- Rows are added to in one order, so that no two statements wait in a circle.
create function {schema}.count_inserted() returns trigger
  language plpgsql
as $body$
begin
  insert into {schema}.campaign_counts as c (campaign_id, slot, state, deliveries)
    select campaign_id, pg_backend_pid() % 64, state, count(*)
      from new_rows group by campaign_id, state order by campaign_id, state
    on conflict (campaign_id, slot, state) do update set deliveries = c.deliveries + excluded.deliveries;
  return null;
end
$body$;

create function {schema}.count_updated() returns trigger
  language plpgsql
as $body$
begin
  insert into {schema}.campaign_counts as c (campaign_id, slot, state, deliveries)
    select campaign_id, pg_backend_pid() % 64, state, sum(n)
      from (select campaign_id, state, 1 as n from new_rows union all select campaign_id, state, -1 from old_rows) as changes
     group by campaign_id, state having sum(n) <> 0 order by campaign_id, state
    on conflict (campaign_id, slot, state) do update set deliveries = c.deliveries + excluded.deliveries;
  return null;
end
$body$;

create function {schema}.count_deleted() returns trigger
  language plpgsql
as $body$
begin
  insert into {schema}.campaign_counts as c (campaign_id, slot, state, deliveries)
    select campaign_id, pg_backend_pid() % 64, state, -count(*)
      from old_rows group by campaign_id, state order by campaign_id, state
    on conflict (campaign_id, slot, state) do update set deliveries = c.deliveries + excluded.deliveries;
  return null;
end
$body$;

create function {schema}.refuse_truncate() returns trigger
  language plpgsql
as $body$
begin
  raise exception 'truncate of % is not counted: delete its rows', tg_table_name;
end
$body$;

create trigger deliveries_inserted after insert on {schema}.deliveries
  referencing new table as new_rows for each statement execute function {schema}.count_inserted();
create trigger deliveries_updated after update on {schema}.deliveries
  referencing old table as old_rows new table as new_rows for each statement execute function {schema}.count_updated();
create trigger deliveries_deleted after delete on {schema}.deliveries
  referencing old table as old_rows for each statement execute function {schema}.count_deleted();
create trigger deliveries_truncated before truncate on {schema}.deliveries
  for each statement execute function {schema}.refuse_truncate();
