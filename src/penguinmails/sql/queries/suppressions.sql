select address, reason, source, created_at from penguinmails.suppressions
 where %(reason)s::text is null or reason = %(reason)s
 order by created_at desc, address limit %(limit)s
