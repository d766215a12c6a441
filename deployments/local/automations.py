"""What the Prefect server does by itself: mark runs that died without a word, and tell somebody how a sweep ended.

Imports Prefect, so it is used in the process that registers the deployments, and in tests.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from deployments.states import REGRESSION

OUR_FLOWS = ["federated", "sweep", "report"]
SILENT_FOR = timedelta(seconds=120)
"""Four heartbeats of `deployments.local.environment`: a run that skips one is busy, one that skips four is gone."""

NOTIFY_URL = "FEDLORA_NOTIFY_URL"
NOTIFY_BLOCK = "fedlora-notify"
"""Name of the `webhook` block that is called at the end of a sweep; it keeps the address, which is a secret."""

Done = Literal["created", "updated", "unchanged"]

_ENDED = ("Completed", REGRESSION, "Failed", "Crashed", "Cancelled", "TimedOut")
_NOT_RUNNING = (*_ENDED, "Paused", "Suspended", "Scheduled", "AwaitingRetry")
_WHY = f"""(flow_run.state.message or "" if flow_run.state.name in ["Completed", "{REGRESSION}"] else "")"""
"""What a sweep says of itself that ran to its end; an error's words may hold what is nobody's business."""
_TEXT = f"""flow.name ~ " '" ~ flow_run.name ~ "' ended: " ~ flow_run.state.name ~ ". " \
~ ({_WHY} ~ ". " if {_WHY} else "") ~ (flow_run|ui_url)"""
_MESSAGE = f"""{{"text": {{{{ ({_TEXT})|tojson }}}}, "flow_run": {{{{ flow_run.name|tojson }}}}, \
"state": {{{{ flow_run.state.name|tojson }}}}, "message": {{{{ {_WHY}|tojson }}}}, \
"url": {{{{ flow_run|ui_url|tojson }}}}}}"""


def apply(silent_for: timedelta = SILENT_FOR) -> dict[str, Done]:
    """Create our automations on the server of `PREFECT_API_URL`, or bring them up to date; by name, what was done.

    One that somebody switched off stays off. A sweep's end is told of when `$FEDLORA_NOTIFY_URL` is set, or a webhook
    block called `fedlora-notify` is there.
    """
    with get_client(sync_client=True) as client:
        wanted = [crashed_without_heartbeat(silent_for)]
        block = _notify_block(client)
        if block is not None:
            wanted.append(sweep_ended(block))
        return {each.name: _upsert(client, each) for each in wanted}


def crashed_without_heartbeat(silent_for: timedelta = SILENT_FOR) -> AutomationCore:
    """A run of ours whose process is gone (killed, machine lost) becomes Crashed, so that it can be retried."""
    heartbeat = "prefect.flow-run.heartbeat"
    return AutomationCore(
        name="fedlora: a run without heartbeat has crashed",
        description="Marks runs whose process died without a word, after four missed heartbeats.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{state}" for state in _NOT_RUNNING)},
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": OUR_FLOWS},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            threshold=1,
            within=silent_for,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no heartbeat for {silent_for.total_seconds():.0f} s: its process is gone. Continue it with "
                "`prefect flow-run retry`, or by running the same again; what is finished is kept.",
            )
        ],
    )


def sweep_ended(block: Any) -> AutomationCore:
    """A sweep that finished or failed is told to the webhook block with this id, as JSON with a `text`."""
    return AutomationCore(
        name="fedlora: tell how a sweep ended",
        description=f"Calls the webhook block {NOTIFY_BLOCK}.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={f"prefect.flow-run.{state}" for state in _ENDED},
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": "sweep"},  # type: ignore[arg-type]
            threshold=1,
            within=timedelta(0),
        ),
        actions=[CallWebhook(block_document_id=block, payload=_MESSAGE)],
    )


def _notify_block(client: SyncPrefectClient) -> Any:
    """The id of the webhook block; made or changed first if an address is given. None: nobody wants to know."""
    url = os.environ.get(NOTIFY_URL)
    if url:
        return Webhook(url=url, headers={"Content-Type": "application/json"}).save(NOTIFY_BLOCK, overwrite=True)
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_block_document_by_name(NOTIFY_BLOCK, "webhook").id
    except ObjectNotFound:
        return None


def _upsert(client: SyncPrefectClient, wanted: AutomationCore) -> Done:
    there = next(iter(client.read_automations_by_name(wanted.name)), None)
    if there is None or there.id is None:
        client.create_automation(wanted)
        return "created"
    wanted = wanted.model_copy(update={"enabled": there.enabled})
    if _essence(there) == _essence(wanted):
        return "unchanged"  # an update would forget the runs that are being watched
    client.update_automation(there.id, wanted)
    return "updated"


def _essence(automation: AutomationCore) -> dict[str, Any]:
    """What can differ between our definition and the server's, without ids."""
    told = {"name", "description", "enabled", "trigger", "actions"}
    return automation.model_dump(include=told, exclude={"trigger": {"id"}})
