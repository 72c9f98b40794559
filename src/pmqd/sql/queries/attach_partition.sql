select {schema}.attach_partition(%(parent)s, %(month)s)
