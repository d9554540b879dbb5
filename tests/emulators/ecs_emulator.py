"""A program: ministack, whose ECS runs tasks as processes of this machine.

    python ecs_emulator.py PORT FOLDER

Clusters, task definitions, roles and logs are ministack's own; RunTask, StopTask, DescribeTasks and
ListTasks are replaced by what is here, which also refuses what ECS refuses. The image's name says
nothing but whether it can be pulled: entry point and command must name a program of this machine.

The action `Control` is for tests: `reset` or `set` some of `Settings`, `kill`, `reclaim`, `tasks`,
`calls`, `end`.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PORT, FOLDER = sys.argv[1], Path(sys.argv[2])
os.environ.update(GATEWAY_PORT=PORT, BIND_HOST="127.0.0.1", MINISTACK_HOST="127.0.0.1")

from ministack.core.responses import (  # type: ignore[import-untyped]  # noqa: E402
    error_response_json,
    json_response,
)
from ministack.services import (  # type: ignore[import-untyped]  # noqa: E402
    autoscaling,
    cloudwatch_logs,
    ec2,
    ecs,
    s3,
)
from ministack.services.cloudformation import provisioners  # type: ignore[import-untyped]  # noqa: E402

Request = dict[str, Any]
Reply = tuple[Any, ...]

REGION, ACCOUNT = "us-east-1", "000000000000"
QUOTAS = {"L-3032A538": "FARGATE", "L-36FBB829": "FARGATE_SPOT"}
PASSED = (
    *("PATH", "HOME", "LANG", "TMPDIR"),
    *("CALL_RECORD_FOLDER", "PYTHONPATH", "BOTOCORE_EXPERIMENTAL__PLUGINS"),
)
NO_CAPACITY = (
    "Capacity is unavailable at this time. "
    "Please try again later or in a different availability zone"
)
NO_QUOTA = "You've reached the limit on the number of vCPUs you can run concurrently"


@dataclass
class Settings:
    start_delay: float = 0.0  # seconds before a task's process starts
    list_delay: float = 0.0  # seconds before ListTasks and DescribeTasks tell of a task
    capacity: dict[str, int] = field(default_factory=dict)  # provider -> tasks at once
    without_role: int = 0  # clusters that cannot be created yet: ECS is new to the account
    attach_delay: float = 0.0  # seconds for which a cluster's list of providers changes
    shortage: dict[str, str] = field(default_factory=dict)  # market -> why no instance
    unborn: dict[str, int] = field(default_factory=dict)  # provider -> tasks not born
    vcpus: dict[str, float] = field(default_factory=dict)  # provider -> quota
    throttle: dict[str, int] = field(default_factory=dict)  # action -> calls refused
    lose: dict[str, int] = field(default_factory=dict)  # action -> replies lost
    owners: dict[str, str] = field(default_factory=dict)  # bucket -> another account
    says: dict[str, Any] = field(default_factory=dict)  # an error of aws_errors.json
    says_times: int = 0  # how often RunTask, or the next task, answers with it
    task_endpoints: dict[str, str] = field(default_factory=dict)  # variables of tasks


class Refusal(Exception):
    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.reply: Reply = error_response_json(code, message, status)


class Task:
    """One task: a thread that starts its process and waits for it."""

    def __init__(self, request: Request, definition: Request, provider: str) -> None:
        self.id = uuid.uuid4().hex
        cluster = _cluster(request)
        self.arn = f"arn:aws:ecs:{REGION}:{ACCOUNT}:task/{cluster['clusterName']}/{self.id}"
        self.definition, self.provider = definition, provider
        self.container = definition["containerDefinitions"][0]
        self.command = _command(request, self.container)
        self.created = time.time()
        self.process: subprocess.Popen[bytes] | None = None
        self.told = threading.Event()  # that it shall stop
        self.lock = threading.Lock()
        self.said: Request = {
            "taskArn": self.arn,
            "clusterArn": cluster["clusterArn"],
            "taskDefinitionArn": definition["taskDefinitionArn"],
            "capacityProviderName": provider,
            "launchType": definition["requiresCompatibilities"][0],
            "lastStatus": "PROVISIONING",
            "desiredStatus": "RUNNING",
            "createdAt": self.created,
            "startedBy": request.get("startedBy", ""),
            "tags": request.get("tags", []),
            "overrides": request.get("overrides", {}),
            "cpu": definition["cpu"],
            "memory": definition["memory"],
            "containers": [{"name": self.container["name"], "lastStatus": "PENDING"}],
        }

    @property
    def live(self) -> bool:
        return bool(self.said["lastStatus"] != "STOPPED")

    @property
    def vcpus(self) -> float:
        return int(self.definition["cpu"]) / 1024

    def run(self) -> None:
        """Go through the life of a task; on a thread of its own."""
        while _lacks_instance(self.provider):
            if self.told.wait(0.05):
                self._end()
                return
        if self.told.wait(settings.start_delay):
            self._end()
            return
        with lock:
            said = _says("start")
        if said:
            self._end(said["code"], said["text"])
            return
        problem = _start_problem(self.container)
        if _due(settings.unborn, self.provider):
            problem = NO_CAPACITY
        if problem:
            self._end("TaskFailedToStart", problem)
            return
        if not self._start():
            return
        assert self.process is not None
        assert self.process.stdout is not None
        self._forward_log(self.process.stdout.fileno())
        code = self.process.wait()
        _kill_group(self.process.pid)  # a container ends with its first process
        self.process.stdout.close()
        self.said["containers"][0]["exitCode"] = code if code >= 0 else 128 - code
        self._end("EssentialContainerExited", "Essential container in task exited")

    def stop(self, code: str, reason: str) -> None:
        with self.lock:
            if self.told.is_set() or not self.live:
                return
            self.said |= {
                "desiredStatus": "STOPPED",
                "stopCode": code,
                "stoppedReason": reason,
            }
            self.told.set()
            if self.process is None:
                return
            self.process.terminate()
        grace = self.container.get("stopTimeout", 30)
        killer = threading.Timer(grace, self.process.kill)
        killer.daemon = True
        killer.start()

    def _start(self) -> bool:
        with self.lock:
            if self.told.is_set():
                self._end()
                return False
            try:
                self.process = subprocess.Popen(
                    self.command,
                    env=_environment(self),
                    cwd=FOLDER,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self._end("TaskFailedToStart", f"CannotStartContainerError: exec: {error}")
                return False
        self.said |= {"lastStatus": "RUNNING", "startedAt": time.time()}
        return True

    def _end(self, code: str = "", reason: str = "") -> None:
        self.said.setdefault("stopCode", code)
        self.said.setdefault("stoppedReason", reason)
        self.said |= {
            "desiredStatus": "STOPPED",
            "lastStatus": "STOPPED",
            "stoppedAt": time.time(),
        }
        self.said["containers"][0]["lastStatus"] = "STOPPED"

    def _forward_log(self, pipe: int) -> None:
        options = self.container["logConfiguration"]["options"]
        stream = f"{options['awslogs-stream-prefix']}/{self.container['name']}/{self.id}"
        place = {"logGroupName": options["awslogs-group"], "logStreamName": stream}
        cloudwatch_logs._create_log_stream(place)
        with (FOLDER / f"{self.id}.log").open("ab") as file:
            while data := os.read(pipe, 65536):
                file.write(data)
                file.flush()
                now = int(time.time() * 1000)
                lines = data.decode(errors="replace").splitlines()
                events = [{"timestamp": now, "message": line} for line in lines]
                cloudwatch_logs._put_log_events({**place, "logEvents": events})


settings = Settings()
tasks: dict[str, Task] = {}
tokens: dict[str, tuple[Request, Request]] = {}
calls: list[tuple[str, Request]] = []
requested: list[Request] = []  # increases of quotas
lock = threading.RLock()


# --- actions -------------------------------------------------------------------------


def run_task(request: Request) -> Request:
    token = request.get("clientToken")
    if token in tokens:
        before, reply = tokens[token]
        if before != request:
            raise Refusal("ConflictException", f"clientToken {token} was used for another request")
        return reply
    definition, provider = _check_run(request)
    if said := _says("call"):
        raise Refusal(said["code"], said["text"], said["status"])
    if said := _says("failure"):
        return {"tasks": [], "failures": [{"reason": said["text"]}] * request["count"]}
    each = int(definition["cpu"]) / 1024
    quota = settings.vcpus.get(provider)
    if quota is not None and _used(provider) + each * request["count"] > quota:
        raise Refusal("ClientException", NO_QUOTA)
    started: list[Task] = []
    room = settings.capacity.get(provider, 10**9) - sum(t.live for t in _of(provider))
    for _ in range(max(0, min(room, request["count"]))):
        task = Task(request, definition, provider)
        tasks[task.id] = task
        started.append(task)
    for task in started:
        threading.Thread(target=task.run, daemon=True).start()
    failures = [{"reason": NO_CAPACITY}] * (request["count"] - len(started))
    reply = {"tasks": [dict(t.said) for t in started], "failures": failures}
    if token:
        tokens[token] = (request, reply)
    return reply


def stop_task(request: Request) -> Request:
    _cluster(request)
    task = _find(request["task"])
    if task is None:
        raise Refusal("InvalidParameterException", "The referenced task was not found.")
    task.stop("UserInitiated", request.get("reason", "Task stopped by user"))
    return {"task": dict(task.said)}


def describe_tasks(request: Request) -> Request:
    _cluster(request)
    if not 1 <= len(request["tasks"]) <= 100:
        raise Refusal("InvalidParameterException", "1 to 100 tasks may be described.")
    found, missing = [], []
    for name in request["tasks"]:
        task = _find(name)
        if task is None or time.time() - task.created < settings.list_delay:
            missing.append({"arn": name, "reason": "MISSING"})
        else:
            found.append(dict(task.said))
    if "TAGS" not in request.get("include", []):
        found = [{k: v for k, v in said.items() if k != "tags"} for said in found]
    return {"tasks": found, "failures": missing}


def list_tasks(request: Request) -> Request:
    cluster = _cluster(request)
    filters = request.keys() - {"cluster", "maxResults", "nextToken"}
    if "startedBy" in filters and len(filters) > 1:
        raise Refusal("InvalidParameterException", "startedBy must be the only filter.")
    status = request.get("desiredStatus", "RUNNING")
    family, started_by = request.get("family"), request.get("startedBy")
    now = time.time()
    arns = [
        task.arn
        for task in tasks.values()
        if task.said["clusterArn"] == cluster["clusterArn"]
        and task.said["desiredStatus"] == status
        and now - task.created >= settings.list_delay
        and family in (None, task.definition["family"])
        and started_by in (None, task.said["startedBy"])
    ]
    start, size = int(request.get("nextToken", 0)), request.get("maxResults", 100)
    reply: Request = {"taskArns": arns[start : start + size]}
    if start + size < len(arns):
        reply["nextToken"] = str(start + size)
    return reply


def control(request: Request) -> Request:
    """What a test asks for; not an action of ECS."""
    if request.get("reset"):
        vars(settings).update(asdict(Settings()))
        requested.clear()
    for name, value in request.get("set", {}).items():
        setattr(settings, name, value)
    for name in request.get("kill", []):
        process = tasks[name].process
        if process is not None:
            process.kill()
    for name in request.get("reclaim", []):
        tasks[name].stop("SpotInterruption", "Your Spot Task was interrupted.")
    if request.get("end"):
        _end_all()
    return {
        "settings": asdict(settings),
        "calls": calls if request.get("calls") else [],
        "tasks": [
            {**task.said, "id": task.id, "pid": task.process.pid if task.process else 0}
            for task in tasks.values()
        ],
    }


def _as_handler(name: str, action: Callable[[Request], Request]) -> Callable[[Request], Reply]:
    def handle(request: Request) -> Reply:
        with lock:
            if name != "Control":
                calls.append((name, request))
            if _due(settings.throttle, name):
                return error_response_json("ThrottlingException", "Rate exceeded", 400)  # type: ignore[no-any-return]
            try:
                reply = action(request)
            except Refusal as refusal:
                return refusal.reply
            if _due(settings.lose, name):
                return error_response_json("ServerException", "lost", 500)  # type: ignore[no-any-return]
            return json_response(reply)  # type: ignore[no-any-return]

    return handle


# --- checks --------------------------------------------------------------------------


def _check_run(request: Request) -> tuple[Request, str]:
    cluster = _cluster(request)
    definition = ecs._task_defs.get(ecs._resolve_td_key(request["taskDefinition"]))
    if definition is None or definition["status"] != "ACTIVE":
        raise Refusal("ClientException", "TaskDefinition not found.")
    if not 1 <= request.get("count", 1) <= 10:
        raise Refusal("InvalidParameterException", "count must be 1 to 10.")
    if not re.fullmatch(r"[\w/-]{0,128}", request.get("startedBy", ""), re.ASCII):
        raise Refusal("InvalidParameterException", "startedBy is invalid.")
    if len(json.dumps(request.get("overrides", {}))) > 8192:
        raise Refusal("InvalidParameterException", "overrides are longer than 8192.")
    network = request.get("networkConfiguration", {}).get("awsvpcConfiguration", {})
    own = definition["networkMode"] == "awsvpc"  # an interface of the task's own
    if own and not network.get("subnets"):
        raise Refusal("InvalidParameterException", "subnets can not be empty.")
    if network and not own:
        raise Refusal(
            "InvalidParameterException",
            "Network Configuration is not valid for the given networkMode of this task definition.",
        )
    for subnet in network.get("subnets", ()):
        if "missing" in subnet:
            raise Refusal("InvalidParameterException", f"The subnet ID '{subnet}' does not exist")
    for role in (definition["executionRoleArn"], definition["taskRoleArn"]):
        if "missing" in role:
            raise Refusal(
                "ClientException",
                f"ECS was unable to assume the role '{role}' that was provided.",
            )
    [item] = request["capacityProviderStrategy"]
    provider: str = item["capacityProvider"]
    if provider not in cluster["capacityProviders"]:
        raise Refusal(
            "InvalidParameterException",
            "The specified capacity provider strategy cannot contain a capacity provider that is "
            "not associated with the cluster. Associate the capacity provider with the cluster or "
            "specify a valid capacity provider and try again.",
        )
    kind = "FARGATE" if provider.startswith("FARGATE") else "EC2"
    if kind not in definition["requiresCompatibilities"]:
        raise Refusal(
            "InvalidParameterException",
            f"The task definition is not compatible with {kind}.",
        )
    return definition, provider


def _cluster(request: Request) -> Request:
    cluster = ecs._clusters.get(ecs._resolve_cluster_name(request.get("cluster", "default")))
    if cluster is None:
        raise Refusal("ClusterNotFoundException", "Cluster not found.")
    found: Request = cluster
    return found


def _start_problem(container: Request) -> str:
    image = container["image"]
    if "missing" in image:
        return (
            f"CannotPullContainerError: pull image manifest has been retried 1 time(s): "
            f"failed to resolve ref {image}: {image}: not found"
        )
    if "unreachable" in image:
        return (
            "ResourceInitializationError: unable to pull secrets or registry auth: "
            "The task cannot pull registry auth: RequestError: send request failed "
            "caused by: dial tcp: i/o timeout"
        )
    group = container["logConfiguration"]["options"]["awslogs-group"]
    groups = json.loads(cloudwatch_logs._describe_log_groups({"logGroupNamePrefix": group})[2])
    if not groups["logGroups"]:
        return (
            "ResourceInitializationError: failed to validate logger args: "
            "create stream has been retried 1 times: failed to create Cloudwatch log stream: "
            "ResourceNotFoundException: The specified log group does not exist."
        )
    return ""


# --- bits ----------------------------------------------------------------------------


def _lacks_instance(provider: str) -> bool:
    return any(f"-{market}-" in provider for market in settings.shortage)


def _find(name: str) -> Task | None:
    return tasks.get(name.rpartition("/")[2])


def _of(provider: str) -> list[Task]:
    return [task for task in tasks.values() if task.provider == provider]


def _used(provider: str) -> float:
    return sum(task.vcpus for task in _of(provider) if task.live)


def _due(counts: dict[str, int], name: str) -> bool:
    if counts.get(name, 0) < 1:
        return False
    counts[name] -= 1
    return True


def _says(where: str) -> Request:
    """The error that a test wants said there now, if any."""
    if settings.says.get("where") != where or settings.says_times < 1:
        return {}
    settings.says_times -= 1
    return settings.says


def _command(request: Request, container: Request) -> list[str]:
    overrides = request.get("overrides", {}).get("containerOverrides", [])
    command = container.get("command", [])
    for override in overrides:
        if override["name"] == container["name"]:
            command = override.get("command", command)
    return [*container.get("entryPoint", []), *command]


def _environment(task: Task) -> dict[str, str]:
    """What a container gets: nothing of the client's environment."""
    bare = {name: os.environ[name] for name in PASSED if name in os.environ}
    theirs = {k: v for k, v in os.environ.items() if k.startswith("TASKS_")}
    overrides = task.said["overrides"].get("containerOverrides", [])
    said = {
        variable["name"]: variable["value"]
        for one in (task.container, *overrides)
        for variable in one.get("environment", [])
    }
    return {
        **bare,
        **{name.removeprefix("TASKS_"): value for name, value in theirs.items()},
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": REGION,
        "AWS_EXECUTION_ENV": "AWS_ECS_FARGATE",
        "ECS_CONTAINER_METADATA_URI_V4": f"http://127.0.0.1:{metadata.server_port}/v4/{task.id}",
        **settings.task_endpoints,
        **said,
    }


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _end_all() -> None:
    for task in tasks.values():
        task.told.set()
        if task.process is not None and task.process.poll() is None:
            _kill_group(task.process.pid)


def _quotas(action: str, request: Request) -> tuple[Request, int]:
    """What Service Quotas answers, and with which status."""
    code = request["QuotaCode"]
    quota = {"ServiceCode": request["ServiceCode"], "QuotaCode": code}
    if code not in QUOTAS:
        return {"__type": "NoSuchResourceException"}, 400
    value = settings.vcpus.get(QUOTAS[code], 4000.0)
    if action in ("GetServiceQuota", "GetAWSDefaultServiceQuota"):
        return {"Quota": {**quota, "Value": value, "Adjustable": True}}, 200
    before = [r for r in requested if r["QuotaCode"] == code]
    if action == "ListRequestedServiceQuotaChangeHistoryByQuota":
        return {"RequestedQuotas": before}, 200
    assert action == "RequestServiceQuotaIncrease", action
    if before:
        return {"__type": "ResourceAlreadyExistsException"}, 400
    if request["DesiredValue"] <= value:
        return {"__type": "IllegalArgumentException"}, 400
    wish = {**quota, "DesiredValue": request["DesiredValue"], "Status": "PENDING"}
    requested.append(wish)
    return {"RequestedQuota": wish}, 200


class Metadata(http.server.BaseHTTPRequestHandler):
    """What tasks ask about themselves; and Service Quotas, which ministack lacks."""

    def do_GET(self) -> None:
        task = tasks.get(self.path.split("/")[2])
        if task is None:
            self._answer({}, 404)
            return
        definition = task.definition
        family, revision = definition["family"], str(definition["revision"])
        about = {"TaskARN": task.arn, "Family": family, "Revision": revision}
        self._answer(about, 200)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        action = self.headers["X-Amz-Target"].rpartition(".")[2]
        with lock:
            if _due(settings.throttle, action):
                self._answer({"__type": "TooManyRequestsException"}, 429)
                return
            self._answer(*_quotas(action, request))

    def _answer(self, body: Request, status: int) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


_attach = ecs._put_cluster_capacity_providers
_attached: dict[str, float] = {}  # when the cluster's list was changed


def put_cluster_capacity_providers(request: Request) -> Request:
    """ministack's own, which ECS takes some time over, refusing others meanwhile."""
    name = _cluster(request)["clusterName"]
    if time.time() - _attached.get(name, 0) < settings.attach_delay:
        raise Refusal("UpdateInProgressException", "There is a cluster update in progress.")
    _attached[name] = time.time()
    reply: Request = json.loads(_attach(request)[2])
    return reply


metadata = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)

for _name, _action in {
    "RunTask": run_task,
    "StopTask": stop_task,
    "DescribeTasks": describe_tasks,
    "ListTasks": list_tasks,
    "PutClusterCapacityProviders": put_cluster_capacity_providers,
    "Control": control,
}.items():
    ecs._ACTION_MAP[_name] = _as_handler(_name, _action)

_ask_s3 = s3.handle_request


async def handle_s3(method: str, path: str, headers: Any, *more: Any, **options: Any) -> Reply:
    """ministack's own, which does not look at whom a bucket is expected to belong to."""
    expected = {k.lower(): v for k, v in headers.items()}.get("x-amz-expected-bucket-owner")
    owner = settings.owners.get(path.lstrip("/").partition("/")[0], ACCOUNT)
    if expected not in (None, owner):
        refused = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        return 403, {"Content-Type": "application/xml"}, b"" if method == "HEAD" else refused
    reply: Reply = await _ask_s3(method, path, headers, *more, **options)
    return reply


s3.handle_request = handle_s3

_cluster_handlers = provisioners._RESOURCE_HANDLERS["AWS::ECS::Cluster"]
_create_cluster = _cluster_handlers["create"]


def create_cluster(*about: Any) -> Any:
    """ministack's own, for CloudFormation; it has that role from the beginning."""
    with lock:
        if settings.without_role > 0:
            settings.without_role -= 1
            raise RuntimeError(
                'Resource handler returned message: "Invalid request provided: CreateCluster '
                "Invalid Request: Unable to assume the service linked role. Please verify that the "
                "ECS service linked role exists. (Service: AmazonECS; Status Code: 400; Error "
                'Code: InvalidParameterException)" (HandlerErrorCode: InvalidRequest)'
            )
    return _create_cluster(*about)


_cluster_handlers["create"] = create_cluster

_INSTANCES = {"c8a.xlarge": (4, 8192, "x86_64"), "c8g.large": (2, 4096, "arm64")}
_describe_types = ec2._describe_instance_types


def describe_instance_types(request: Request) -> Reply:
    """ministack's answer, which is the same for all types, made that of some."""
    name = ec2._p(request, "InstanceType.1")
    reply: Reply
    if not name:
        named = (f"<instanceType>{one}</instanceType>" for one in _INSTANCES)
        items = "".join(f"<item>{one}</item>" for one in named)
        inner = f"<instanceTypeSet>{items}</instanceTypeSet>"
        reply = ec2._xml(200, "DescribeInstanceTypesResponse", inner)
    elif name not in _INSTANCES:
        text = f"The following supplied instance types do not exist: [{name}]"
        reply = ec2._error("InvalidInstanceType", text, 400)
    else:
        vcpus, memory, architecture = _INSTANCES[name]
        status, headers, body = _describe_types(request)
        said = body.decode().replace("x86_64", architecture)
        said = re.sub(r"<defaultVCpus>\d+", f"<defaultVCpus>{vcpus}", said)
        said = re.sub(r"<sizeInMiB>\d+", f"<sizeInMiB>{memory}", said)
        reply = (status, headers, said.encode())
    return reply


def describe_scaling_activities(request: Request) -> Reply:
    name = request["AutoScalingGroupName"]
    said = [t for m, t in settings.shortage.items() if t and f"-{m}-" in name]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1))
    members = "".join(
        f"<member><ActivityId>1</ActivityId><AutoScalingGroupName>{name}</AutoScalingGroupName><Cause>wanted</Cause>"
        f"<StartTime>{now}</StartTime><StatusCode>Failed</StatusCode><StatusMessage>{text}</StatusMessage></member>"
        for text in said
    )
    return autoscaling._xml(  # type: ignore[no-any-return]
        200,
        "DescribeScalingActivitiesResponse",
        f"<DescribeScalingActivitiesResult><Activities>{members}</Activities></DescribeScalingActivitiesResult>",
    )


ec2._ACTION_MAP["DescribeInstanceTypes"] = describe_instance_types
autoscaling._ACTION_MAP["DescribeScalingActivities"] = describe_scaling_activities
_read_log = cloudwatch_logs._get_log_events


def get_log_events(request: Request) -> Reply:
    with lock:
        throttled = _due(settings.throttle, "GetLogEvents")
    if throttled:
        return error_response_json("ThrottlingException", "Rate exceeded", 400)  # type: ignore[no-any-return]
    reply: Reply = _read_log(request)
    return reply


cloudwatch_logs._get_log_events = get_log_events

if __name__ == "__main__":
    threading.Thread(target=metadata.serve_forever, daemon=True).start()
    (FOLDER / "metadata-port").write_text(str(metadata.server_port))
    sys.argv = ["ministack"]
    from ministack.app import main  # type: ignore[import-untyped]

    main()
