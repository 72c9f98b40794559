-- Only the leader of this term names a new life of Redis.
update {schema}.leader set redis_epoch = gen_random_uuid() where term = %(term)s returning redis_epoch
