select {schema}.make_partition(%(parent)s, %(month)s)
