//! Those who wait: their order, what they lack, and the room that is kept for them.

use vramd_api::{MemoryType, Priority};
use vramd_core::Tick;
use vramd_core::ledger::{DeviceFacts, Ledger, Request};
use vramd_core::queue::{Queue, Waiting};

use crate::ledger::{GRANULARITY, MIB, World, allocate, device, facts, limit, now, release, request};

fn waiting(id: u128, size: u64, priority: Priority, deadline: u64) -> Waiting {
    let request = Request { priority, ..request(id, size) };
    Waiting { requests: vec![request], on: vec![device(0)], deadline: Tick(deadline) }
}

#[test]
fn those_who_wait_go_by_priority_then_by_age_and_nobody_overtakes() {
    let mut world = World::new();
    let all = allocate(&mut world, 32 * MIB).unwrap();
    let mut queue = Queue::default();
    assert!(queue.push(waiting(1001, 20 * MIB, Priority::Normal, 100)));
    assert!(queue.push(waiting(1002, 2 * MIB, Priority::Normal, 100)));
    assert!(queue.push(waiting(1003, 20 * MIB, Priority::High, 100)));
    assert!(queue.admit(&mut world.ledger, now(0)).is_empty());
    release(&mut world, all);
    let granted: Vec<_> =
        queue.admit(&mut world.ledger, now(0)).into_iter().map(|(id, _)| id.0.as_u128()).collect();
    assert_eq!(granted, [1003], "the small one waits behind the older large one");
    assert_eq!(queue.expired(Tick(100)).len(), 2);
    assert!(queue.is_empty());
}

#[test]
fn a_request_of_another_memory_type_closes_no_device_to_those_behind_it() {
    let mut world = World::new();
    let mut queue = Queue::default();
    let ram = Request { memory_type: Some(MemoryType::Ram), ..request(1001, MIB) };
    assert!(queue.push(Waiting { requests: vec![ram], on: vec![], deadline: Tick(100) }));
    assert!(queue.push(waiting(1002, 2 * MIB, Priority::Normal, 100)));
    assert_eq!(queue.admit(&mut world.ledger, now(0)).len(), 1);
}

#[test]
fn claimed_room_is_for_those_who_wait_for_it_alone() {
    let mut world = World::new();
    let all = allocate(&mut world, 32 * MIB).unwrap();
    let mut queue = Queue::default();
    let group = vec![request(1001, 12 * MIB), request(1002, 12 * MIB)];
    assert_eq!(world.ledger.lacks(&group, &device(0)), Some(24 * MIB));
    assert_eq!(world.ledger.lacks(&[request(1003, 33 * MIB)], &device(0)), None);
    assert!(queue.push(Waiting { requests: group.clone(), on: vec![device(0)], deadline: Tick(100) }));
    world.ledger.claim(group[0].id, &device(0), 24 * MIB);
    release(&mut world, all);
    world.ledger.check().unwrap();
    // Who does not wait gets what is left.
    assert!(world.ledger.reserve(request(99, 9 * MIB), &[device(0)], now(0)).is_err());
    assert_eq!(world.ledger.usage(&device(0)).unwrap().available_bytes, 8 * MIB);
    let granted = queue.admit(&mut world.ledger, now(0));
    assert_eq!(
        granted.iter().map(|(id, grants)| (*id, grants.len())).collect::<Vec<_>>(),
        [(group[0].id, 2)]
    );
    assert!(world.ledger.give_up_claim(group[0].id).is_none());
    world.ledger.check().unwrap();
    assert!(queue.is_empty());
    // A claim that is given up is free again.
    world.ledger.claim(request(98, 1).id, &device(0), 8 * MIB);
    assert_eq!(world.ledger.usage(&device(0)).unwrap().available_bytes, 0);
    assert_eq!(world.ledger.give_up_claim(request(98, 1).id), Some((device(0), 8 * MIB)));
    assert_eq!(world.ledger.usage(&device(0)).unwrap().available_bytes, 8 * MIB);
}

#[test]
fn who_made_room_gets_it_though_one_before_them_waits_for_more() {
    let mut world = World::new();
    let stays = allocate(&mut world, 12 * MIB).unwrap();
    let goes = allocate(&mut world, 20 * MIB).unwrap();
    let mut queue = Queue::default();
    // It has nothing go for it, and is first, by its age or by its priority.
    assert!(queue.push(waiting(1001, 30 * MIB, Priority::High, 100)));
    let maker = waiting(1002, 20 * MIB, Priority::Normal, 100);
    world.ledger.claim(maker.id(), &device(0), 20 * MIB);
    assert!(queue.push(maker));
    assert!(queue.push(waiting(1003, MIB, Priority::Normal, 100)));
    assert_eq!(queue.next_on(&world.ledger).len(), 2);
    release(&mut world, goes);
    let granted: Vec<_> =
        queue.admit(&mut world.ledger, now(0)).into_iter().map(|(id, _)| id.0.as_u128()).collect();
    assert_eq!(granted, [1002]);
    release(&mut world, stays);
    world.ledger.check().unwrap();
}

#[test]
fn parts_need_not_fit_into_one_segment_together() {
    let mut ledger = Ledger::default();
    ledger.add_device(DeviceFacts { max_segment_bytes: 8 * MIB, ..facts(0, 32 * MIB) });
    let parts = [request(1, 6 * MIB), request(2, 6 * MIB)];
    assert!(
        ledger.could_fit_all(&parts, &[])
            && !ledger.could_fit_all(&[request(3, MIB), request(4, 9 * MIB)], &[])
    );
    assert_eq!(ledger.lacks(&parts, &device(0)), Some(0));
    for on in [vec![], vec![device(0)]] {
        let mut trial = ledger.clone();
        let grants = trial.reserve_all(&parts, &on, now(0)).unwrap();
        assert_eq!(grants.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [parts[0].id, parts[1].id]);
        trial.check().unwrap();
    }
}

#[test]
fn what_lacks_is_enough_for_small_parts_beside_large_ones() {
    for small in [1, 10, 40] {
        let mut world = World::new();
        let held = allocate(&mut world, 32 * MIB - 4 * MIB).unwrap();
        let mut parts: Vec<_> = (0..small).map(|number| request(1000 + number, 200 << 10)).collect();
        parts.push(request(2000, 5 * MIB));
        let lacks = world.ledger.lacks(&parts, &device(0)).unwrap();
        assert!(world.ledger.reserve_all(&parts, &[device(0)], now(0)).is_none());
        release(&mut world, held);
        // So much that exactly what lacked is free, and the rest is held.
        allocate(&mut world, 28 * MIB - lacks.next_multiple_of(GRANULARITY)).unwrap();
        assert_eq!(world.ledger.lacks(&parts, &device(0)), Some(0));
        assert!(world.ledger.reserve_all(&parts, &[device(0)], now(0)).is_some(), "{small}");
        world.ledger.check().unwrap();
    }
}

#[test]
fn what_is_held_beyond_the_limit_lacks_too() {
    let mut world = World::new();
    allocate(&mut world, 24 * MIB).unwrap();
    world.ledger.set_limits(&device(0), limit(Some(10 * MIB)));
    assert_eq!(world.ledger.lacks(&[request(99, 5 * MIB)], &device(0)), Some(19 * MIB));
    assert_eq!(world.ledger.lacks(&[request(99, 11 * MIB)], &device(0)), None);
}
