"""Lists and stops what costs money in SageMaker: apps (JupyterLab, TensorBoard, ...), endpoints, notebook instances and training
jobs.

Everything is shown before it is stopped. Data stays: a space keeps its volume, a notebook instance its disk, and a job's files stay
in S3. Of a run it knows the name in the tag alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.hardware import INSTANCES
from qlora_helpers.machine.studio import this_app
from qlora_helpers.sagemaker.aws import aws_errors_explained, delete_endpoint, new_client
from qlora_helpers.sagemaker.tags import Made, made_by, maker

_APP_KEYS = ("DomainId", "UserProfileName", "SpaceName", "AppType", "AppName")


@dataclass(frozen=True)
class Resource:
    """Something that runs in SageMaker and costs money while it does.

    Attributes:
        kind: `app`, `endpoint`, `notebook instance` or `training job`; or what costs nothing and is left when an endpoint is
            gone, `endpoint configuration` or `model`.
        name: its name.
        status: as SageMaker names it, such as `InService`.
        note: the kind of app, its owner, its run, its instance and what that costs.
        request: the arguments of the call that stops it.
        is_this: whether it is the app that this code runs in.
        arn: by which its tags are found; empty for an app.
        run: the run that it was made for, as its tag says.
    """

    kind: str
    name: str
    status: str
    note: str = ""
    request: dict[str, str] = field(default_factory=dict, repr=False)
    is_this: bool = False
    arn: str = field(default="", repr=False)
    run: str = ""

    def __str__(self) -> str:
        warning = "  <- this notebook runs here" if self.is_this else ""
        return f"{self.kind:<17}  {self.name:<30}  {self.status:<10}  {self.note}{warning}"


def list_sagemaker(
    *, run: str | None = None, everybodys: bool = False, leftovers: bool = False, client: Any = None
) -> list[Resource]:
    """Lists what of one's own runs in SageMaker in this region, with its price; the app that this code runs in comes last.

    One's own are the endpoints and jobs that this package made for the same person (`tags.maker`), and the apps of this space.

    Args:
        run: the name of a run: only what was made for it is listed, and no apps.
        everybodys: whether to list what others in this account run too, whatever made it.
        leftovers: whether to list also endpoint configurations and models that no endpoint uses; they cost nothing.
        client: a SageMaker client; None makes one.

    Raises:
        UserError: no region is set, there are no credentials, or the role may not list.
    """
    client = client or new_client("sagemaker")
    with aws_errors_explained("list what runs in SageMaker"):
        found = [*_apps(client), *_endpoints(client), *_notebook_instances(client), *_training_jobs(client)]
        if leftovers:
            found += _leftovers(client, [each for each in found if each.kind == "endpoint"])
        me = None if everybodys else maker()
        tagged = [_tagged(resource, client) if not everybodys or run else (resource, Made()) for resource in found]
    mine = [each for each, made in tagged if me is None or _is_mine(each, made, me)]
    chosen = [_priced(resource, client) for resource in mine if run is None or resource.run == run]
    return sorted(chosen, key=lambda resource: resource.is_this)


def _tagged(resource: Resource, client: Any) -> tuple[Resource, Made]:
    if not resource.arn:
        return resource, Made()
    made = made_by(resource.arn, client=client)
    note = _joined(resource.note, f"run {made.run}" if made.run else "")
    return dataclasses.replace(resource, run=made.run or "", note=note), made


def _is_mine(resource: Resource, made: Made, me: str) -> bool:
    if resource.kind == "app":
        here = this_app()
        owner = [name for name in ("SpaceName", "UserProfileName") if name in here]
        return bool(owner) and all(resource.request.get(name) == here.get(name) for name in ("DomainId", *owner))
    return made.by == me


def _priced(resource: Resource, client: Any) -> Resource:
    """Adds the instances of an endpoint or a job, and what an hour of an instance costs where the catalogue knows it."""
    from botocore.exceptions import BotoCoreError, ClientError

    note = resource.note
    with contextlib.suppress(BotoCoreError, ClientError, KeyError):  # a role may list what it may not describe
        if resource.kind == "endpoint":
            config = client.describe_endpoint(EndpointName=resource.name)["EndpointConfigName"]
            variants = client.describe_endpoint_config(EndpointConfigName=config)["ProductionVariants"]
            used = [(each["InstanceType"], each.get("InitialInstanceCount", 1)) for each in variants]
            note = _joined(note, *(f"{count} x {kind}" if count > 1 else kind for kind, count in used))
        elif resource.kind == "training job":
            used = client.describe_training_job(TrainingJobName=resource.name)["ResourceConfig"]
            count, kind = used.get("InstanceCount", 1), used["InstanceType"]
            note = _joined(note, f"{count} x {kind}" if count > 1 else kind)
    prices = []
    for word in note.split(", "):
        count, _, kind = word.rpartition(" x ")
        instance = INSTANCES.get(kind)
        if instance and instance.price_usd_per_hour is not None:
            usd = int(count or 1) * instance.price_usd_per_hour
            prices.append(f"about {usd:.2f} USD an hour ({instance.region}, {instance.priced_on})")
    return dataclasses.replace(resource, note=_joined(note, *prices))


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def stop_sagemaker(resources: Iterable[Resource], *, confirm: bool = False, client: Any = None) -> list[Resource]:
    """Shows what would be stopped and, if `confirm` is True, stops it.

    Apps and endpoints (with their configuration and models, if the endpoint's maker made them with this package) are deleted, as
    are leftovers; notebook instances and training jobs are stopped.
    SageMaker takes some minutes to finish.

    Args:
        resources: from `list_sagemaker()`.
        confirm: False stops nothing.
        client: a SageMaker client; None makes one.

    Returns:
        What was stopped.

    Raises:
        UserError: AWS refuses; everything before it in the list was stopped.
    """
    chosen = list(resources)
    for resource in chosen:
        print(resource)
    if not confirm:
        print("Nothing was stopped. The same call with confirm=True stops it.")
        return []
    client = client or new_client("sagemaker")
    stop = {
        "app": client.delete_app,
        "notebook instance": client.stop_notebook_instance,
        "training job": client.stop_training_job,
        "endpoint configuration": client.delete_endpoint_config,
        "model": client.delete_model,
    }
    for resource in chosen:
        if resource.kind == "endpoint":
            delete_endpoint(resource.name, client=client)
        else:
            with aws_errors_explained(f"stop the {resource.kind} {resource.name}"):
                stop[resource.kind](**resource.request)
    return chosen


def stop_this_app(*, client: Any = None) -> dict[str, str]:
    """Shuts down the Studio app that this code runs in; its space keeps its volume. Returns the app.

    Args:
        client: a SageMaker client; None makes one.

    Raises:
        UserError: this code does not run in a Studio app, or AWS refuses.
    """
    app = this_app()
    if not {"DomainId", "AppType", "AppName"} <= app.keys():
        raise UserError("this is not an app of SageMaker Studio", next_step="Shut the machine down another way.")
    client = client or new_client("sagemaker")
    with aws_errors_explained(f"shut down the app {app['AppName']}"):
        client.delete_app(**app)
    return app


def _apps(client: Any) -> Iterator[Resource]:
    here = this_app()
    for page in client.get_paginator("list_apps").paginate():
        for app in page["Apps"]:
            if app["Status"] not in ("InService", "Pending"):
                continue
            request = {key: app[key] for key in _APP_KEYS if key in app}
            owner = f"space {app['SpaceName']}" if "SpaceName" in app else f"user {app.get('UserProfileName', '?')}"
            instance = app.get("ResourceSpec", {}).get("InstanceType")
            note = ", ".join(part for part in (app["AppType"], owner, instance) if part)
            is_this = bool(here) and here.items() <= request.items()
            yield Resource("app", app["AppName"], app["Status"], note, request, is_this)


def _endpoints(client: Any) -> Iterator[Resource]:
    for page in client.get_paginator("list_endpoints").paginate():
        for endpoint in page["Endpoints"]:
            if endpoint["EndpointStatus"] != "Deleting":
                yield Resource(
                    "endpoint", endpoint["EndpointName"], endpoint["EndpointStatus"], arn=endpoint["EndpointArn"]
                )


def _notebook_instances(client: Any) -> Iterator[Resource]:
    for page in client.get_paginator("list_notebook_instances").paginate(StatusEquals="InService"):
        for instance in page["NotebookInstances"]:
            name = instance["NotebookInstanceName"]
            note = instance.get("InstanceType", "")
            request = {"NotebookInstanceName": name}
            yield Resource("notebook instance", name, "InService", note, request, arn=instance["NotebookInstanceArn"])


def _training_jobs(client: Any) -> Iterator[Resource]:
    for page in client.get_paginator("list_training_jobs").paginate(StatusEquals="InProgress"):
        for job in page["TrainingJobSummaries"]:
            name = job["TrainingJobName"]
            request = {"TrainingJobName": name}
            yield Resource("training job", name, "InProgress", "", request, arn=job["TrainingJobArn"])


def _leftovers(client: Any, endpoints: Iterable[Resource]) -> Iterator[Resource]:
    """Yields endpoint configurations and models that no endpoint uses."""
    configs: dict[str, str] = {}
    for page in client.get_paginator("list_endpoint_configs").paginate():
        configs |= {each["EndpointConfigName"]: each["EndpointConfigArn"] for each in page["EndpointConfigs"]}
    used = {client.describe_endpoint(EndpointName=each.name)["EndpointConfigName"] for each in endpoints}
    models = set()
    for name, arn in configs.items():
        if name in used:
            variants = client.describe_endpoint_config(EndpointConfigName=name)["ProductionVariants"]
            models |= {each.get("ModelName") for each in variants}
        else:
            yield Resource("endpoint configuration", name, "unused", "", {"EndpointConfigName": name}, arn=arn)
    for page in client.get_paginator("list_models").paginate():
        for model in page["Models"]:
            if model["ModelName"] not in models:
                request = {"ModelName": model["ModelName"]}
                yield Resource("model", model["ModelName"], "unused", "", request, arn=model["ModelArn"])
