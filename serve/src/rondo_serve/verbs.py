"""The verbs that this distribution adds to the command `rondo`. Nothing here imports torch."""

from rondo_govern import settings
from rondo_serve.config import GatewayConfig, ServeConfig

SERVE = (ServeConfig, "rondo_serve.serve:run")
GATEWAY = (GatewayConfig, "rondo_serve.gateway.app:run")
POLICY = {
    "check": (settings.PolicyCheckConfig, "rondo_govern.explain:run_check"),
    "explain": (settings.PolicyExplainConfig, "rondo_govern.explain:run_explain"),
}
KEYS = {
    "new": (settings.KeysNewConfig, "rondo_govern.keys_commands:run_new"),
    "revoke": (settings.KeysRevokeConfig, "rondo_govern.keys_commands:run_revoke"),
    "list": (settings.KeysListConfig, "rondo_govern.keys_commands:run_list"),
}
AUDIT = {
    "verify": (settings.AuditVerifyConfig, "rondo_govern.audit.commands:run_verify"),
    "usage": (settings.AuditUsageConfig, "rondo_govern.audit.commands:run_usage"),
    "report": (settings.AuditReportConfig, "rondo_govern.audit.page:run_report"),
    "replay": (settings.AuditReplayConfig, "rondo_serve.replay:run"),
}
