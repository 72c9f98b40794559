delete from penguinmails.suppressions where address = penguinmails.address_key(%(address)s) returning address
