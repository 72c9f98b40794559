insert into penguinmails.suppressions (address, reason, source)
values (penguinmails.address_key(%(address)s), %(reason)s, %(source)s)
on conflict (address) do nothing
returning address
