select {schema}.retire_partition(%(parent)s, %(month)s, %(keep)s::uuid[])
