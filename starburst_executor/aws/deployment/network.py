"""The network for workers: subnets, and whether they have a way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starburst_executor.aws.account import Clients, asking
from starburst_executor.errors import AccountError

__all__ = ["Network", "find_network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network for workers.

    Attributes:
        vpc: Id of the VPC.
        subnets: Ids of the subnets.
        public_ip: Whether workers there need a public address.
        without_s3: Ids of the private route tables that lack a gateway endpoint to S3.
        warnings: What may not work, for display.
    """

    vpc: str
    subnets: tuple[str, ...]
    public_ip: bool
    without_s3: tuple[str, ...]
    warnings: tuple[str, ...]


def find_network(
    clients: Clients,
    *,
    vpc: str | None,
    subnets: tuple[str, ...],
    public_ip: bool | None,
    before: Mapping[str, str],
    own_endpoint: str | None,
) -> Network:
    """Find the network for workers; change nothing.

    Args:
        clients: Clients for the region.
        vpc: The VPC to use; None for that of the subnets, or the default one.
        subnets: The subnets to use; if empty, those of the VPC, only the public ones if there are
            any.
        public_ip: Whether workers get public addresses; None: if their way out needs them.
        before: The existing stack's parameters, kept unless overridden.
        own_endpoint: Id of the gateway endpoint that the stack created, which does not count.

    Raises:
        AccountError: something does not exist or does not belong together.
    """
    if before and not vpc and not subnets:
        subnets = tuple(before["SubnetIds"].split(","))
        if public_ip is None:
            public_ip = before["AssignPublicIp"] == "true"
    found = _subnets(clients, vpc, subnets)
    vpc = _only_vpc(found)
    tables = _tables(clients, vpc)
    public = [s for s in found if _leads_to(_table_of(s, tables), "igw-")]
    chosen = found if subnets or not public else public
    if public_ip is None:
        public_ip = bool(public)
    # From a public subnet S3 is reached free of charge anyway, and its table serves others too.
    used = {t["RouteTableId"]: t for t in (_table_of(subnet, tables) for subnet in chosen)}
    private = sorted(name for name, table in used.items() if not _leads_to(table, "igw-"))
    return Network(
        vpc=vpc,
        subnets=tuple(subnet["SubnetId"] for subnet in chosen),
        public_ip=public_ip,
        without_s3=_without_s3(clients, vpc, private, own_endpoint),
        warnings=tuple(_warnings(chosen, tables, public_ip=public_ip)),
    )


def _only_vpc(subnets: Sequence[Any]) -> str:
    vpc: str = subnets[0]["VpcId"]
    if any(subnet["VpcId"] != vpc for subnet in subnets):
        raise AccountError(
            "the subnets are in several VPCs; give subnets of one: "
            + ", ".join(f"{s['SubnetId']} in {s['VpcId']}" for s in subnets)
        )
    return vpc


def _subnets(clients: Clients, vpc: str | None, ids: tuple[str, ...]) -> list[Any]:
    ec2 = clients.get("ec2")
    with asking("looking at the subnets"):
        if ids:
            found = ec2.describe_subnets(SubnetIds=list(ids))["Subnets"]
        else:
            vpc = vpc or _default_vpc(ec2)
            where = [{"Name": "vpc-id", "Values": [vpc]}]
            found = ec2.describe_subnets(Filters=where)["Subnets"]
    if not found:
        raise AccountError(f"the VPC {vpc} has no subnets; give some with --subnets")
    return sorted(found, key=lambda subnet: str(subnet["SubnetId"]))


def _default_vpc(ec2: Any) -> str:
    filters = [{"Name": "is-default", "Values": ["true"]}]
    found = ec2.describe_vpcs(Filters=filters)["Vpcs"]
    if not found:
        raise AccountError(
            "the account has no default VPC in this region; give --vpc or --subnets, or create one "
            "with `aws ec2 create-default-vpc`"
        )
    name: str = found[0]["VpcId"]
    return name


def _tables(clients: Clients, vpc: str) -> list[Any]:
    filters = [{"Name": "vpc-id", "Values": [vpc]}]
    with asking("looking at the route tables"):
        found: list[Any] = clients.get("ec2").describe_route_tables(Filters=filters)["RouteTables"]
    return found


def _table_of(subnet: Any, tables: Iterable[Any]) -> Any:
    """The route table of a subnet: its own, or the VPC's main one."""
    main = None
    for table in tables:
        for link in table.get("Associations", ()):
            if link.get("SubnetId") == subnet["SubnetId"]:
                return table
            if link.get("Main"):
                main = table
    if main is None:
        raise AccountError(f"no route table found for {subnet['SubnetId']}; is its VPC complete?")
    return main


def _leads_to(table: Any, kind: str) -> bool:
    fields = ("GatewayId", "NatGatewayId", "TransitGatewayId", "InstanceId")
    return any(
        str(route.get(field, "")).startswith(kind)
        for route in table.get("Routes", ())
        if route.get("DestinationCidrBlock") == "0.0.0.0/0"
        for field in fields
    )


def _warnings(subnets: Iterable[Any], tables: Sequence[Any], *, public_ip: bool) -> Iterable[str]:
    for subnet in subnets:
        table, name = _table_of(subnet, tables), subnet["SubnetId"]
        if _leads_to(table, "igw-") and not public_ip:
            yield (
                f"workers in {name} can only reach VPC endpoints: the subnet's way out is an "
                "internet gateway, which requires public addresses (--assign-public-ip)"
            )
        if not any(_leads_to(table, kind) for kind in ("igw-", "nat-", "tgw-", "i-")):
            yield (
                f"{name} has no way out: without VPC endpoints for ECR, CloudWatch Logs and ECS, "
                "workers there cannot start"
            )


def _without_s3(
    clients: Clients, vpc: str, tables: Sequence[str], own: str | None
) -> tuple[str, ...]:
    """Route tables without a gateway endpoint to S3, not counting the stack's `own`."""
    filters = [
        {"Name": "vpc-id", "Values": [vpc]},
        {"Name": "service-name", "Values": [f"com.amazonaws.{clients.region}.s3"]},
        {"Name": "vpc-endpoint-type", "Values": ["Gateway"]},
    ]
    with asking("looking at the VPC's endpoints"):
        reply = clients.get("ec2").describe_vpc_endpoints(Filters=filters)
    served = {
        table
        for endpoint in reply["VpcEndpoints"]
        if endpoint["VpcEndpointId"] != own
        for table in endpoint.get("RouteTableIds", ())
    }
    return tuple(table for table in tables if table not in served)
