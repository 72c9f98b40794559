-- The jobs in the claims that a rescue is about, whether they still run or not.
select distinct held.id
from {schema}.claims c left join {schema}.instances i on i.id = c.instance_id cross join {schema}.ticker t cross join unnest(c.ids) held(id)
where case %(scope)s
  when 'worker' then c.worker_id = %(worker_id)s
  when 'instance' then c.instance_id = %(instance_id)s
  else i.id is null or t.tick - i.lease_tick > 32 end
order by held.id
