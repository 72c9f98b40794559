-- After a failover that lost commits: what a worker runs under a claim that the promoted standby does not know becomes its own again, under
-- the same token, so that its settle counts and nobody runs it beside it. Nobody may claim meanwhile: see beat(). A row that has got on
-- further than this attempt, or belongs to somebody else, is left alone. Arrays sorted by id, as in settle.sql.
with taken as (
  update {schema}.jobs j
  set status = 'running', ready = false, attempt_count = (%(attempts)s::int[])[width_bucket(j.id, %(ids)s::uuid[])],
      claim_token = %(token)s, worker_id = %(worker_id)s, started_at = now(), updated_at = now()
  where j.id = any(%(ids)s::uuid[]) and j.id between %(lowest)s and %(highest)s and j.status in ('queued', 'migrated_to_redis')
    and (%(attempts)s::int[])[width_bucket(j.id, %(ids)s::uuid[])] between j.attempt_count + 1 and j.max_attempts
    and exists (
      select from {schema}.instances i, {schema}.ticker t where i.id = %(instance_id)s and t.tick - i.lease_tick <= 25)
  returning j.id
), held as (
  insert into {schema}.claims as c (token, worker_id, instance_id, ids)
  select %(token)s, %(worker_id)s, %(instance_id)s, array_agg(t.id) from taken t having count(*) > 0
  on conflict (token) do update set ids = c.ids || excluded.ids
)
select t.id from taken t
