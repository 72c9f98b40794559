-- After a rescue: claims of which nothing runs any more. A claim that committed in between stays, and is found by the next beat.
delete from {schema}.claims c
using {schema}.ticker t
where (case %(scope)s
    when 'worker' then c.worker_id = %(worker_id)s
    when 'instance' then c.instance_id = %(instance_id)s
    else not exists (select from {schema}.instances i where i.id = c.instance_id and t.tick - i.lease_tick <= 32) end)
  and not exists (
    select from unnest(c.ids) as held(id) join {schema}.jobs j on j.id = held.id
    where j.status = 'running' and j.claim_token = c.token)
