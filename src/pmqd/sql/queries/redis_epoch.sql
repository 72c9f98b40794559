select redis_epoch from {schema}.leader
