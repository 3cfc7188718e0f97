"""The audit log: what was asked, decided, executed and billed, chained so that tampering shows."""
