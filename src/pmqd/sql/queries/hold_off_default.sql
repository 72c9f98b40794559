select {schema}.hold_off_default(%(parent)s, %(month)s)
