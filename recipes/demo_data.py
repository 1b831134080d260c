"""Write the demo's data: customers' messages, English and Chinese, and the one line of JSON each should become.

    python recipes/demo_data.py [--out data/demo] [--seed 0] [--rows 2000] [--multi_turn 300] [--heldout 100]

Three JSON Lines files: `train.jsonl` and `heldout.jsonl` in Alpaca form (instruction, input, output) and
`train_multi_turn.jsonl` in ShareGPT form (the customer changes something, the answer follows). Customers,
products, order ids and phrasings of the held-out rows never occur in training: a model that scores well on
them has learned the task, not the rows.
"""

import argparse
import json
import random
from pathlib import Path

INSTRUCTION = "Turn the message into JSON."

# Everything below is written twice, for training and for held-out rows; the two sides share no entry.
WORDS = {
    "train": {
        "en": {
            "name": "Anna Ben Carla David Emma Felix Grace Henry Irene Jack Karen Leo Maria Noah Olga Paul".split(),
            "product": [
                f"{kind} {thing}"
                for kind in (
                    "red black blue white yellow pink orange small large round square wooden plastic cotton steel glass "
                    "iron marble folding portable electric digital vintage modern striped winter summer kids baby dog cat "
                    "garden kitchen bathroom desk wall floor pocket office fishing hiking cycling running apple aqua beige bronze brown camel cedar cherry chrome clay cobalt coral cream crimson dotted double elastic fancy flat floral foam forest frosted gift gray guest heavy hemp honey indigo khaki lace lemon lilac lime magnetic maple mini mint nylon ocean olive organic oval padded pearl plain plush quilted rattan rose royal ruby rustic sage sand scarlet silent sky slim smart spare spiral stone straw suede teal thick thin tiny urban wide zebra concrete ceramic teak pine ash elm birch cork jute wicker felt velvet satin brass tin zinc opal ivory amber jade"
                ).split()
                for thing in (
                    "lamps chairs towels mugs shelves bags pillows clocks bowls tables mirrors blankets jackets gloves hats "
                    "shirts shoes knives forks plates bottles jars boxes baskets frames rugs mats brushes filters fans "
                    "cables chargers keyboards speakers headphones cameras notebooks pens markers toys puzzles drums ladders "
                    "hammers drills stools ropes buckets hoses seeds helmets racks hooks timers scales whistles umbrellas sofas beds crates trunks vases pots jugs spoons aprons quilts kites dolls"
                ).split()
            ],
            "order": [
                "I would like to order {n} {p}",
                "please send me {n} {p}",
                "can I buy {n} {p}?",
                "I want to buy {n} {p}",
                "I need {n} {p}",
                "we want to order {n} {p} for the office",
                "put me down for {n} {p}",
                "I'd like {n} {p}",
            ],
            "cancel": [
                "please cancel order {i}, the {n} {p}",
                "I want to cancel my order {i} for {n} {p}",
                "can you cancel the {n} {p}? Order {i}",
                "cancel {n} {p} from order {i}",
                "order {i} with {n} {p} should be cancelled",
                "I changed my mind, cancel the {n} {p}, order number {i}",
            ],
            "return": [
                "I want to return {n} {p} from order {i}",
                "the {n} {p} of order {i} are broken, I want to send them back",
                "how do I return {n} {p}? My order is {i}",
                "order {i}: {n} {p} arrived damaged, I would like a refund",
                "I am returning {n} {p}, order {i}",
                "please take back the {n} {p} from order {i}",
            ],
            "track": [
                "where is my order {i} with {n} {p}?",
                "when will the {n} {p} of order {i} arrive?",
                "I am still waiting for {n} {p}, order {i}",
                "has order {i} been shipped? It has {n} {p}",
                "what is the status of order {i}, {n} {p}?",
                "my {n} {p} have not arrived, order {i}",
            ],
            "high": [
                "It is urgent.",
                "As soon as possible!",
                "I need this today.",
                "This is urgent, please hurry.",
            ],
            "low": ["No rush.", "There is no hurry.", "Take your time."],
            "opener": [
                "Hi, {c} here:",
                "Hello,",
                "Good morning, this is {c}.",
                "Hi,",
                "Dear shop,",
                "{c} here,",
                "",
            ],
        },
        "zh": {
            "name": "小王 小李 小张 小陈 小刘 老赵 小周 小吴 小郑 小孙".split(),
            "product": [
                kind + thing
                for kind in "红色 木头 黑色 大号 小号 蓝色 黄色 塑料 玻璃 棉布 电动 折叠 儿童 迷你 圆形 户外 陶瓷 复古 橙色 灰色 粉色 羊毛 不锈钢 长款 轻便 防水 简约 双层 方形 厚款".split()
                for thing in (
                    "台灯 椅子 毛巾 杯子 书架 背包 枕头 闹钟 碗 桌子 毯子 外套 手套 帽子 鞋子 刀 盘子 "
                    "雨衣 窗帘 花瓶 吊灯 书包 手机壳 茶壶 闹铃 拖鞋 皮带 领带 戒指 手电筒 瓶子 盒子 刷子 风扇 键盘 音箱 耳机 相机 笔记本 玩具 梯子 锤子 凳子 水桶 头盔"
                ).split()
            ],
            "order": [
                "我想买{n}个{p}",
                "请给我{n}个{p}",
                "我要订{n}个{p}",
                "我需要{n}个{p}",
                "能买{n}个{p}吗",
            ],
            "cancel": [
                "请取消订单{i}的{n}个{p}",
                "我要取消{n}个{p}，订单{i}",
                "订单{i}，{n}个{p}，帮我取消",
                "{n}个{p}不要了，取消订单{i}",
                "麻烦取消一下，订单{i}，{n}个{p}",
            ],
            "return": [
                "我要退货，订单{i}，{n}个{p}",
                "订单{i}的{n}个{p}坏了，我要退货",
                "{n}个{p}想退货，订单号{i}",
                "请帮我退掉订单{i}的{n}个{p}",
                "买的{n}个{p}坏了，想退款，订单{i}",
                "麻烦退一下{n}个{p}，订单{i}",
            ],
            "track": [
                "订单{i}的{n}个{p}到哪里了",
                "我的{n}个{p}什么时候到？订单{i}",
                "{n}个{p}什么时候能送到？订单{i}",
                "想问一下订单{i}的{n}个{p}什么时候到货",
                "订单{i}发货了吗？{n}个{p}",
                "{n}个{p}还没有收到，订单{i}",
            ],
            "high": ["很急！", "请尽快。", "今天就要，非常急。"],
            "low": ["不急。", "慢慢来，不着急。"],
            "opener": ["你好，", "你好，我是{c}，", "您好，", "我是{c}。", ""],
        },
    },
    "heldout": {
        "en": {
            "name": "Sofia Victor Wendy Yusuf Zoe Oscar Priya Tomas".split(),
            "product": [
                f"{kind} {thing}"
                for kind in (
                    "bamboo silver linen green leather travel rubber copper silk paper oak camping wool purple canvas "
                    "granite crystal walnut denim golden"
                ).split()
                for thing in (
                    "trays candles curtains scarves belts adapters boots pans ties lanterns benches tents socks vests "
                    "rings wallets carpets stickers magnets"
                ).split()
            ],
            "order": [
                "could you please send {n} {p} to my address",
                "I would like to buy {n} of your {p}",
                "my team wants to order {n} {p}",
                "I want {n} {p}, please",
            ],
            "cancel": [
                "would you cancel {n} {p}? That is order {i}",
                "I have to cancel order {i} ({n} {p})",
                "do not send the {n} {p}, just cancel order {i}",
            ],
            "return": [
                "can I return the {n} {p} that came with order {i}?",
                "I got {n} {p} with order {i} and want a refund",
                "{n} {p} from order {i} are damaged, I will send them back",
            ],
            "track": [
                "could you tell me where order {i} is? I bought {n} {p}",
                "when do my {n} {p} arrive? The order is {i}",
                "the {n} {p} from order {i} have still not arrived",
            ],
            "high": ["Please hurry, it is very urgent!", "I need it as soon as possible, today if you can."],
            "low": ["There is really no rush.", "Please take your time, no hurry."],
            "opener": ["Good evening, my name is {c};", "Hey there,", "Hello, I am {c},"],
        },
        "zh": {
            "name": "阿明 阿芳 小林 小何".split(),
            "product": [
                kind + thing
                for kind in "绿色 竹子 银色 白色 紫色 金色 皮革 便携".split()
                for thing in "雨伞 篮子 水壶 围巾 地毯 镜子 手表 沙发".split()
            ],
            "order": ["麻烦给我订{n}个{p}", "我想要买{n}个{p}，谢谢"],
            "cancel": ["麻烦把订单{i}的{n}个{p}取消", "订单{i}请取消，是{n}个{p}"],
            "return": ["订单{i}的{n}个{p}我想退货", "收到的{n}个{p}坏了，要退货，订单是{i}"],
            "track": ["请问订单{i}的{n}个{p}什么时候能到", "麻烦查一下{n}个{p}到哪里了，订单{i}"],
            "high": ["麻烦尽快，非常急！", "今天急用，请尽快！"],
            "low": ["真的不急。", "不着急，慢慢来。"],
            "opener": ["早上好，", "您好，我叫{c}，"],
        },
    },
}
NUMBERS = {
    "en": "two three four five six seven eight nine ten".split(),
    "zh": "两 三 四 五 六 七 八 九 十".split(),
}
CHANGES = {
    "en": [
        "Sorry, make it {n}.",
        "I meant {n}, not {m}.",
        "Please change the number to {n}.",
        "Actually {n}.",
    ],
    "zh": ["改成{n}个。", "我说错了，是{n}个。", "请改为{n}个。"],
}
FIRST_ID = {"train": 20_000, "heldout": 70_000}


def to_json(order: dict[str, object]) -> str:
    """The one line of JSON: fixed keys in a fixed order, no ASCII escapes."""
    return json.dumps(order, ensure_ascii=False)


def draw(rng: random.Random, side: str) -> tuple[str, str, dict[str, object]]:
    """One (language, message, order) of `side` "train" or "heldout"."""
    language = "zh" if rng.random() < 0.3 else "en"
    words = WORDS[side][language]
    intent = rng.choice(["order", "cancel", "return", "track"])
    urgency = rng.choices(["normal", "high", "low"], [2, 1, 1])[0]
    quantity = rng.randint(2, 10) if rng.random() < 0.5 else rng.randint(11, 60)
    number = NUMBERS[language][quantity - 2] if quantity <= 10 and rng.random() < 0.5 else str(quantity)
    product = rng.choice(words["product"])
    order_id = None if intent == "order" else str(FIRST_ID[side] + rng.randrange(30_000))
    request = rng.choice(words[intent]).format(n=number, p=product, i=order_id)
    opener = rng.choice(words["opener"]).format(c=rng.choice(words["name"]))
    hurry = "" if urgency == "normal" else rng.choice(words[urgency])
    if language == "en":
        request += "" if request.endswith("?") else "."
        text = " ".join(part for part in (opener, request, hurry) if part)
    else:
        text = opener + request + "。" + hurry
    order = {
        "intent": intent,
        "product": product,
        "quantity": quantity,
        "urgency": urgency,
        "order_id": order_id,
    }
    return language, text[0].upper() + text[1:], order


def alpaca_rows(rng: random.Random, side: str, count: int) -> list[dict[str, str]]:
    """`count` different rows in Alpaca form."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        _, text, order = draw(rng, side)
        rows[text] = {"instruction": INSTRUCTION, "input": text, "output": to_json(order)}
    return list(rows.values())


def multi_turn_rows(rng: random.Random, count: int) -> list[dict[str, list[dict[str, str]]]]:
    """`count` ShareGPT conversations: a message, its JSON, a change of the quantity, the new JSON."""
    rows = []
    for _ in range(count):
        language, text, order = draw(rng, "train")
        quantity = rng.choice([n for n in range(2, 60) if n != order["quantity"]])
        change = rng.choice(CHANGES[language]).format(n=quantity, m=order["quantity"])
        turns = [f"{INSTRUCTION}\n\n{text}", to_json(order), change, to_json({**order, "quantity": quantity})]
        rows.append(
            {"conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}
        )
    return rows


def write(out: Path, seed: int = 0, rows: int = 2000, multi_turn: int = 300, heldout: int = 100) -> None:
    """Write the three files; the same arguments give the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "train.jsonl": alpaca_rows(random.Random(seed), "train", rows),
        "train_multi_turn.jsonl": multi_turn_rows(random.Random(seed + 1), multi_turn),
        "heldout.jsonl": alpaca_rows(random.Random(seed + 2), "heldout", heldout),
    }
    for name, content in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (out / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--multi_turn", type=int, default=300)
    parser.add_argument("--heldout", type=int, default=100)
    write(**vars(parser.parse_args()))
