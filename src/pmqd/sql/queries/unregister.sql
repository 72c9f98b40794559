delete from {schema}.instances where id = %(instance_id)s
