"""The bodies of the wire, as types: camelCase keys, sizes in bytes, times in RFC 3339.

They describe plain dicts. A key marked ``NotRequired`` is absent where it does not apply, never null or 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:  # annotations are never evaluated at run time, so Python 3.10 needs no backport
    from typing_extensions import NotRequired

MemoryType = Literal["RAM", "VRAM", "Shared", "Unified", "Unknown"]
AllocationType = Literal["Buffer", "Weights", "KvCache", "Activation", "Workspace", "Staging"]
Priority = Literal["Low", "Normal", "High", "Critical"]
PlanOutcome = Literal["resident", "fits", "evicts", "noRoom", "tooLarge"]
Basis = Literal["estimate", "learned", "interpolated"]
OnShortage = Literal["fail", "wait", "evict", "spill"]
AllocationStatus = Literal["Active", "Moving", "Releasing"]
DeviceHealth = Literal["Healthy", "Lost"]
PressureLevel = Literal["Normal", "Moderate", "High", "Critical"]
ResidencyState = Literal["OnDisk", "Loading", "Resident", "Evicting"]
OperationState = Literal["Queued", "Running", "Completed", "Failed", "Cancelled"]
Include = Literal["allocations", "usage", "fragmentation", "processes"]
Sort = Literal["createdAt", "-createdAt", "sizeBytes", "-sizeBytes"]
Access = Literal["read", "write"]
HandleType = Literal["memfd", "vulkanOpaqueFd", "cudaPosixFd"]
TransferMode = Literal["move", "copy"]
ClearTarget = Literal["Cache", "Unused", "Allocations", "Zero"]
FixedReason = Literal[
    "pinned", "written", "readerDoesNotFollow", "readerNotAnswering", "attached", "busy", "stale", "failed"
]


class ErrorBody(TypedDict):
    code: str
    message: str
    hint: NotRequired[str]
    details: NotRequired[dict[str, Any]]
    status: int
    retryable: bool


class Health(TypedDict):
    status: str
    version: str


class DeviceCapabilities(TypedDict):
    handle: HandleType | None
    readOnlyExport: bool
    hostAccess: bool
    remap: bool
    sparse: bool
    peerCopy: bool


class Device(TypedDict):
    deviceId: str
    uuid: str
    pciAddress: NotRequired[str]
    name: str
    memoryType: MemoryType
    totalBytes: int
    granularityBytes: int
    capabilities: DeviceCapabilities
    health: DeviceHealth
    notes: list[str]


class DevicePage(TypedDict):
    devices: list[Device]


class DeviceProcess(TypedDict):
    pid: int
    command: str
    usedBytes: int | None


class Holder(TypedDict):
    pid: int
    uid: int
    command: str


class Lease(TypedDict):
    leaseId: str
    kind: Literal["connection", "timeToLive", "persistent", "model"]
    expiresAt: NotRequired[str]
    holder: NotRequired[Holder]


class Candidate(TypedDict):
    deviceId: str
    fits: bool
    availableBytes: int
    largestFreeBytes: int
    reason: str


class Placement(TypedDict):
    reason: str
    spilledFrom: NotRequired[list[str]]
    considered: list[Candidate]


class AllocationHistoryEntry(TypedDict):
    at: str
    what: str


class Reservation(TypedDict):
    model: NotRequired[str]
    shape: list[int]
    basis: Basis
    estimateBytes: NotRequired[int]
    learnedBytes: NotRequired[int]
    pid: NotRequired[int]
    usedBytes: int
    peakBytes: int | None


class Footprint(TypedDict):
    model: str
    deviceId: str
    shape: list[int]
    estimateBytes: NotRequired[int]
    learnedBytes: int
    recentPeakBytes: list[int]
    error: float
    meanError: float
    runCount: int
    updatedAt: str


class FootprintPage(TypedDict):
    footprints: list[Footprint]


class Allocation(TypedDict):
    allocationId: str
    deviceId: str
    sizeBytes: int
    blockBytes: int
    alignment: int
    allocationType: AllocationType
    purpose: str
    priority: Priority
    persistent: bool
    status: AllocationStatus
    owner: str
    generation: int
    leases: list[Lease]
    createdAt: str
    placeOf: NotRequired[str]
    reservation: NotRequired[Reservation]
    placement: NotRequired[Placement]
    history: NotRequired[list[AllocationHistoryEntry]]


class AllocationPage(TypedDict):
    allocations: list[Allocation]
    nextPageToken: NotRequired[str]


class Released(TypedDict):
    allocationId: str
    deviceId: str
    releasedBytes: int
    verified: bool
    heldBy: NotRequired[list[Holder]]
    footprint: NotRequired[Footprint]


class Pressure(TypedDict):
    level: PressureLevel
    ratio: float


class FragmentationStatus(TypedDict):
    freeBytes: int
    largestFreeBytes: int
    holeCount: int
    segmentCount: int


class TotalStatus(TypedDict):
    totalBytes: int
    usedBytes: int
    availableBytes: int
    allocatedBytes: int
    poolFreeBytes: int
    readyBytes: int
    reservedBytes: int
    workerBytes: int
    foreignBytes: int
    unknownBytes: int
    utilization: float
    fragmentation: float
    largestFreeBytes: int
    healthScore: int
    pressure: Pressure
    allocationCount: int
    sampledAt: str


class DeviceStatus(TotalStatus):
    deviceId: str
    uuid: str
    name: str
    memoryType: MemoryType
    health: DeviceHealth
    limitBytes: int
    allocations: NotRequired[list[Allocation]]
    usage: NotRequired[DeviceUsage]
    fragmentationDetails: NotRequired[FragmentationStatus]
    usedBy: NotRequired[list[DeviceProcess]]
    processes: NotRequired[list[Holder]]


class MemoryStatus(TypedDict):
    devices: list[DeviceStatus]
    total: TotalStatus


class ShareLimits(TypedDict, total=False):
    limitBytes: int
    reserveBytes: int


class ShareUse(TypedDict):
    limitBytes: NotRequired[int]
    reserveBytes: int
    usedBytes: int


class DeviceLimits(TypedDict):
    deviceId: str
    limitBytes: int
    overridden: bool
    softLimitBytes: NotRequired[int]
    reserveBytes: int
    owners: NotRequired[dict[str, ShareUse]]
    purposes: NotRequired[dict[str, ShareUse]]
    aboveBytes: int
    evicted: NotRequired[list[EvictedComponent]]


class LimitsPage(TypedDict):
    limits: list[DeviceLimits]


class Residency(TypedDict):
    deviceId: str
    state: ResidencyState
    bytes: int
    attachedCount: int
    shared: NotRequired[bool]
    cachedFrom: NotRequired[str]
    allocationId: NotRequired[str]
    operationId: NotRequired[str]


class Checksum(TypedDict):
    algorithm: str
    value: str


class Component(TypedDict):
    name: str
    path: str
    sizeBytes: int
    tensorCount: int
    shardCount: int
    residency: list[Residency]
    checksum: NotRequired[Checksum]
    error: NotRequired[ErrorBody]


class Model(TypedDict):
    name: str
    sizeBytes: int
    components: list[Component]
    pinned: bool
    priority: Priority
    keepAlive: str
    expiresAt: NotRequired[str]
    lastUsedAt: NotRequired[str]
    registeredAt: str


class ModelPage(TypedDict):
    models: list[Model]


class PlannedRun(TypedDict):
    shape: NotRequired[list[int]]
    sizeBytes: NotRequired[int]


class PlanItem(TypedDict):
    model: str
    components: NotRequired[list[str]]
    deviceId: NotRequired[str]
    workingMemory: NotRequired[PlannedRun]


class EvictedComponent(TypedDict):
    model: str
    component: str
    deviceId: str
    bytes: int
    idleSeconds: float
    usesPerHour: float
    loadSeconds: float


class PlannedModel(TypedDict):
    model: str
    outcome: PlanOutcome
    deviceId: NotRequired[str]
    bytes: int
    workingBytes: NotRequired[int]
    seconds: float
    copiedFrom: NotRequired[list[str]]
    evicted: list[EvictedComponent]
    missingBytes: NotRequired[int]


class MemoryPlan(TypedDict):
    fits: bool
    models: list[PlannedModel]
    evicted: list[EvictedComponent]
    seconds: float
    largestSet: NotRequired[list[str]]


class Operation(TypedDict):
    operationId: str
    kind: str
    subject: str
    state: OperationState
    paused: bool
    bytesDone: int
    bytesTotal: int
    bytesPerSecond: NotRequired[int]
    secondsLeft: NotRequired[float]
    startedAt: str
    finishedAt: NotRequired[str]
    error: NotRequired[ErrorBody]
    result: NotRequired[dict[str, Any]]


class OperationPage(TypedDict):
    operations: list[Operation]


class Event(TypedDict):
    id: str
    event: str
    at: str
    data: Any


class TransferItem(TypedDict):
    """An allocation, or a model, or one component of it."""

    allocationId: NotRequired[str]
    model: NotRequired[str]
    component: NotRequired[str]
    sourceDeviceId: NotRequired[str]


class FragmentationFigures(TypedDict):
    largestFreeBytes: int
    poolFreeBytes: int
    holeCount: int
    segmentCount: int


class FixedBlock(TypedDict):
    allocationId: str
    reason: FixedReason
    holders: NotRequired[list[Holder]]


class DefragmentPlan(TypedDict):
    deviceId: str
    moves: int
    bytes: int
    expectedSeconds: NotRequired[float]
    passes: int
    reclaimedBytes: int
    before: FragmentationFigures
    after: FragmentationFigures
    fixed: list[FixedBlock]
    fixedCount: int


class DefragmentPlans(TypedDict):
    plans: list[DefragmentPlan]


class Cleared(TypedDict):
    dryRun: bool
    askedBytes: int
    acknowledgedBytes: int
    measuredBytes: NotRequired[int]
    allocations: list[str]
    models: list[str]
    kept: list[FixedBlock]
    operations: NotRequired[list[str]]


class UsagePeak(TypedDict):
    usedBytes: int
    allocatedBytes: int


class UsageAverage(TypedDict):
    usedBytes: int
    allocatedBytes: int
    availableBytes: int
    utilization: float
    fragmentation: float


class UsageRates(TypedDict):
    allocationsPerSecond: float
    releasesPerSecond: float
    allocatedBytesPerSecond: float
    releasedBytesPerSecond: float
    refusalsPerSecond: float


class UsageShare(TypedDict):
    name: str
    bytes: int
    peakBytes: int
    averageBytes: int


class UsageSample(TypedDict):
    at: str
    usedBytes: int
    allocatedBytes: int
    poolFreeBytes: int
    reservedBytes: int
    foreignBytes: int
    availableBytes: int
    peakUsedBytes: int
    peakAllocatedBytes: int
    fragmentation: float
    allocations: int
    releases: int
    refusals: int


class DeviceUsage(TypedDict):
    deviceId: str
    windowSeconds: int
    stepSeconds: int
    sampledSeconds: int
    peak: NotRequired[UsagePeak]
    average: NotRequired[UsageAverage]
    rates: NotRequired[UsageRates]
    byOwner: list[UsageShare]
    byPurpose: list[UsageShare]
    samples: list[UsageSample]


class UsagePage(TypedDict):
    devices: list[DeviceUsage]


RestartPolicy = Literal["Never", "OnFailure", "Always"]
WorkerState = Literal["Starting", "Ready", "Unresponsive", "Stopping", "Restarting", "Exited", "Failed"]


class WorkerMemory(TypedDict):
    deviceId: str
    measuredBytes: NotRequired[int]
    reportedBytes: NotRequired[int]


class WorkerModel(TypedDict):
    name: str
    modelType: NotRequired[str]
    deviceId: str
    state: Literal["Loaded", "Offloaded"]
    ownBytes: int
    attachedBytes: int
    attachedModel: NotRequired[str]
    busy: bool
    priority: Priority
    useCount: int
    lastUsedAt: NotRequired[str]
    loadSeconds: NotRequired[float]


class WorkerLimit(TypedDict):
    kind: Literal["ControlGroup", "DataSegment", "None"]
    bytes: int
    note: NotRequired[str]


class WorkerExit(TypedDict):
    at: str
    code: NotRequired[int]
    signal: NotRequired[int]
    reason: str


class WorkerFault(TypedDict):
    at: str
    message: str


class LogLine(TypedDict):
    at: str
    text: str


class Worker(TypedDict):
    workerId: str
    name: str
    state: WorkerState
    program: NotRequired[str]
    pid: NotRequired[int]
    uid: NotRequired[int]
    deviceId: NotRequired[str]
    implementation: NotRequired[str]
    framework: NotRequired[str]
    actions: list[str]
    memory: list[WorkerMemory]
    models: list[WorkerModel]
    lastSynchronized: NotRequired[str]
    limit: NotRequired[WorkerLimit]
    restart: NotRequired[RestartPolicy]
    restartCount: int
    nextStartAt: NotRequired[str]
    startedAt: str
    lastHeardAt: NotRequired[str]
    lastExit: NotRequired[WorkerExit]
    faultCount: int
    lastFault: NotRequired[WorkerFault]
    logs: NotRequired[list[LogLine]]


class WorkerPage(TypedDict):
    workers: list[Worker]


class WorkerAnswer(TypedDict):
    workerId: str
    action: str
    data: dict[str, Any]
    milliseconds: float


EvictionPolicy = Literal[
    "LowestCost", "LeastRecentlyUsed", "LeastFrequentlyUsed", "LargestFirst", "LowestPriority"
]
Trend = Literal["Rising", "Steady", "Falling"]


class RecommendedAction(TypedDict):
    action: Literal["dropPool", "unloadModel", "tellWorker", "askWorker", "askToLetGo"]
    reason: str
    bytes: int
    call: str


class DevicePressure(TypedDict):
    deviceId: str
    pressureLevel: PressureLevel
    ratio: float
    availableMemory: int
    freeMemory: int
    totalMemory: int
    utilizationPercentage: float
    stalled: bool
    trend: Trend
    shrinksPerSecond: float
    secondsToExhaustion: NotRequired[float]
    neededBytes: int
    operationId: NotRequired[str]
    recommendedActions: list[RecommendedAction]


class PressurePage(TypedDict):
    devices: list[DevicePressure]


class ModelMemory(TypedDict):
    residentBytes: int
    attachedBytes: int
    idleBytes: int


class WorkerShare(TypedDict):
    workerId: str
    name: str
    state: WorkerState
    measuredBytes: NotRequired[int]
    reportedBytes: NotRequired[int]
    attachedBytes: int
    lastSynchronized: NotRequired[str]


class WorkerMemoryStatus(TypedDict):
    measuredBytes: int
    reportedBytes: int
    workers: list[WorkerShare]
    notes: list[str]


class LoadedModel(TypedDict):
    name: str
    worker: NotRequired[str]
    bytes: int
    busy: bool
    attachedCount: int
    lastUsedAt: NotRequired[str]


class ModelStatus(TypedDict):
    deviceId: str
    systemMemory: DeviceStatus
    modelMemory: ModelMemory
    workerMemory: WorkerMemoryStatus
    totalMemoryUsage: int
    availableForModels: int
    loadedModelCount: int
    loadedModels: list[LoadedModel]
    pressureLevel: PressureLevel
    availableOperations: list[str]
    optimizationRecommendations: list[RecommendedAction]
    lastSynchronized: NotRequired[str]
    lastUpdated: str


class UnloadedModel(TypedDict):
    model: str
    component: NotRequired[str]
    worker: NotRequired[str]
    askedBytes: int
    acknowledgedBytes: int
    measuredBytes: int


class WorkerOutcome(TypedDict):
    workerId: str
    name: str
    askedBytes: int
    acknowledgedBytes: int
    measuredBytes: int
    errors: NotRequired[list[str]]


class PerformanceImpact(TypedDict):
    reloadSeconds: float
    expectedSecondsPerHour: float


class ModelsOptimized(TypedDict):
    operationId: NotRequired[str]
    deviceId: str
    optimizationTriggered: bool
    optimizationStrategy: EvictionPolicy
    neededBytes: int
    askedBytes: int
    acknowledgedBytes: int
    memoryFreed: int
    modelsUnloaded: list[UnloadedModel]
    performanceImpact: PerformanceImpact
    optimizationTimeMs: int
    message: str
    newPressureLevel: PressureLevel
    workers: list[WorkerOutcome]
