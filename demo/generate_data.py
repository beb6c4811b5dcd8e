"""Makes the demo's data: CLUE-format TNEWS, AFQMC and CLUEWSC2020, a corpus without labels, and a vocabulary.

Everything comes from the word lists and templates below and a seed: the same seed, the same bytes. The tasks can be
learnt, but not from single words: a headline also names things of other topics, a question pair shares words whatever
its label is, and who a pronoun means depends on verb and reason together. They say nothing about real CLUE.

    python generate_data.py --output_dir data
"""

import json
import os
import random
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, ".."), HERE]
import data
import make_vocab
from common import cli, files

# TNEWS: label, its name in CLUE, things and events of the topic.
TOPICS = {
    "100": (
        "news_story",
        "老街 奶奶 童年 邻居 书信 旧照片 爷爷 村口 渡船 灯笼",
        "讲起往事 藏着秘密 多年后重逢 留下一句话 让人落泪",
    ),
    "101": (
        "news_culture",
        "书法 诗词 古琴 博物馆 青铜器 京剧 陶瓷 国画 碑文 戏台",
        "展出珍品 传承百年 重新修复 讲述历史 迎来名家",
    ),
    "102": (
        "news_entertainment",
        "歌手 导演 综艺 演唱会 票房 偶像 剧组 主演 红毯 专辑",
        "公布恋情 上映首日 发布新歌 登上热搜 宣布杀青",
    ),
    "103": (
        "news_sports",
        "球队 前锋 门将 教练 联赛 决赛 冠军 篮球 马拉松 奥运",
        "绝杀对手 赢下比赛 伤愈复出 刷新纪录 遭遇连败",
    ),
    "104": (
        "news_finance",
        "银行 利率 贷款 理财 基金 央行 存款 保险 汇率 债券",
        "下调利率 发布财报 提示风险 扩大规模 收紧政策",
    ),
    "106": (
        "news_house",
        "楼盘 房价 公寓 学区房 装修 户型 物业 首付 开发商 租金",
        "开盘售罄 环比上涨 降价促销 交付延期 调整限购",
    ),
    "107": (
        "news_car",
        "轿车 越野车 发动机 油耗 试驾 底盘 变速箱 新能源车 车展 轮胎",
        "正式上市 召回车辆 续航提升 曝光谍照 降价两万",
    ),
    "108": (
        "news_edu",
        "高考 考生 老师 课堂 录取 大学 作文 奖学金 学费 宿舍",
        "公布分数线 改革方案 延长假期 招收新生 减轻负担",
    ),
    "109": (
        "news_tech",
        "芯片 手机 算法 机器人 操作系统 屏幕 数据 实验室 卫星 网络",
        "发布新品 突破瓶颈 开放源码 完成测试 升级系统",
    ),
    "110": (
        "news_military",
        "战机 航母 导弹 士兵 演习 雷达 舰队 坦克 边防 潜艇",
        "实弹演练 首次亮相 击落目标 完成部署 列装部队",
    ),
    "112": (
        "news_travel",
        "古镇 海岛 民宿 雪山 机票 攻略 景区 自驾 草原 温泉",
        "免收门票 游客爆满 推荐路线 开放预约 错峰出行",
    ),
    "113": (
        "news_world",
        "总统 议会 大选 联合国 难民 峰会 外长 使馆 条约 首相",
        "宣布辞职 达成协议 举行会谈 实施制裁 发表声明",
    ),
    "114": (
        "news_stock",
        "股价 大盘 涨停 散户 板块 指数 牛市 市值 主力 个股",
        "尾盘拉升 放量下跌 触及跌停 创下新高 遭到减持",
    ),
    "115": (
        "news_agriculture",
        "玉米 果园 大棚 农户 化肥 小麦 养殖 土壤 收割机 秧苗",
        "迎来丰收 防治虫害 提高产量 滞销求助 推广良种",
    ),
    "116": (
        "news_game",
        "玩家 副本 英雄 皮肤 段位 装备 战队 新手 地图 技能",
        "版本更新 削弱英雄 开启内测 打出连胜 返还点券",
    ),
}
FRAMES = [
    "{a}{e}，{b}怎么办",
    "{place}{a}{e}，网友：没想到",
    "{when}{a}与{b}同时{e}",
    "专家谈{a}：{b}为何{e}",
    "不看{o}看{a}，{b}{e}",
    "从{o}到{a}，{who}亲历{b}{e}",
    "{who}说{a}{e}，{o}也受影响",
    "{a}和{o}哪个重要？{b}{e}给出答案",
    "{when}，{place}的{a}{e}",
    "{num}个{a}里只有一个{b}，{who}{e}",
    "{o}和{p}都不如{a}，{who}说",
    "{when}{place}不缺{o}也不缺{p}，缺的是{a}",
    "说完{o}与{p}，{who}终于谈到{a}{e}",
]
PLACES = ["北京", "上海", "成都", "广州", "西安", "杭州", "武汉", "长沙", "青岛", "昆明"]
TIMES = ["今天", "昨晚", "上周", "今年", "去年底", "春节前", "凌晨", "下个月", "周末", "近日"]
PEOPLE = ["小张", "王先生", "李女士", "记者", "老赵", "大学生", "业内人士", "退休工人", "年轻人", "志愿者"]

# AFQMC: two questions mean the same if thing and wish are the same, however they are asked.
THINGS = ["账单", "额度", "红包", "银行卡", "密码", "优惠券", "订单", "发票"]
WISHES = {
    "取消": ["取消{t}", "把{t}退掉", "不要{t}了"],
    "查看": ["查{t}", "看到我的{t}", "找到{t}"],
    "修改": ["修改{t}", "把{t}换一个", "更换{t}"],
    "开通": ["开通{t}", "办理{t}", "申请{t}"],
    "转给别人": ["把{t}给家人", "转让{t}", "将{t}转给朋友"],
}
ASKING = ["怎么{w}", "我想{w}", "请问可以{w}吗", "为什么不能{w}"]

# CLUEWSC2020: in "A verb B, because he reason" the reason tells who "he" is: 0 is A, 1 is B.
NAMES = ["小明", "小刚", "老王", "老李", "阿强", "阿杰", "大伟", "志国", "建军", "文斌", "子轩", "浩然"]
CASES = [
    ("感谢了{b}", ["帮了大忙", "送来了药", "指了路"], ["心里很感动", "欠着人情", "终于得救"]),
    ("批评了{b}", ["总是迟到", "弄丢了钥匙", "没写作业"], ["实在忍不住", "脾气不好", "看不下去"]),
    ("向{b}道歉", ["还在生气", "受了委屈", "被撞伤了"], ["说错了话", "打碎了杯子", "忘了约定"]),
    ("追上了{b}", ["跑得太慢", "走错了路", "停下来休息"], ["跑得很快", "抄了近路", "骑着车"]),
    ("请{b}吃饭", ["刚刚升职", "远道而来", "过生日"], ["发了工资", "输了打赌", "想谈生意"]),
]


def headline(rng, label):
    """A headline of a topic: most frames name things of another topic too, some more of them than of its own, and half
    of the events are of that other topic. What tells is the place in the sentence."""
    _, things, events = TOPICS[label]
    a, b = rng.sample(things.split(), 2)
    _, other_things, other_events = TOPICS[rng.choice([topic for topic in TOPICS if topic != label])]
    (o, p), events = rng.sample(other_things.split(), 2), rng.choice([events, other_events])
    return rng.choice(FRAMES).format(
        a=a, b=b, e=rng.choice(events.split()), o=o, p=p, place=rng.choice(PLACES), when=rng.choice(TIMES),
        who=rng.choice(PEOPLE), num=rng.choice("三五八"),
    )  # fmt: skip


def question(rng, thing, wish):
    return rng.choice(ASKING).format(w=rng.choice(WISHES[wish]).format(t=thing))


def tnews(rng, number):
    label = rng.choice(list(TOPICS))
    return {"label": label, "label_desc": TOPICS[label][0], "sentence": headline(rng, label), "keywords": ""}


def afqmc(rng, number):
    """Half the pairs mean the same; of the others two thirds share thing or wish, so that common words tell little."""
    thing, wish = rng.choice(THINGS), rng.choice(list(WISHES))
    label, other_thing, other_wish = rng.choice(["0", "1"]), thing, wish
    if label == "0":
        differs = rng.choice(["thing", "wish", "both"])
        if differs != "wish":
            other_thing = rng.choice([t for t in THINGS if t != thing])
        if differs != "thing":
            other_wish = rng.choice([w for w in WISHES if w != wish])
    return {
        "sentence1": question(rng, thing, wish),
        "sentence2": question(rng, other_thing, other_wish),
        "label": label,
    }


def cluewsc2020(rng, number):
    a, b = rng.sample(NAMES, 2)
    verb, *reasons = rng.choice(CASES)
    meant = rng.randint(0, 1)  # 0: a, 1: b
    text = f"{rng.choice(TIMES)}，{a}{verb.format(b=b)}，因为他{rng.choice(reasons[1 - meant])}。"
    name = rng.choice([a, b])
    return {
        "target": {
            "span1_text": name,
            "span1_index": text.index(name),
            "span2_text": "他",
            "span2_index": text.index("他"),
        },
        "idx": number,
        "label": "true" if name == (a, b)[meant] else "false",
        "text": text,
    }


def without_label(row, number):
    return {"id": number, **{key: row[key] for key in row if not key.startswith("label") and key != "idx"}}


def corpus(rng, count):
    """Sentences of all three kinds without their labels."""
    for _ in range(count):
        kind = rng.random()
        if kind < 0.6:
            yield headline(rng, rng.choice(list(TOPICS)))
        elif kind < 0.85:
            # The same question in two ways: whoever predicts its masked characters learns to compare.
            meaning = rng.choice(THINGS), rng.choice(list(WISHES))
            yield f"{question(rng, *meaning)}，{question(rng, *meaning)}"
        else:
            yield cluewsc2020(rng, 0)["text"]


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="gets <task>_public/, corpus/ and vocab.txt")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other records")
    parser.add_argument("--corpus_lines", type=int, default=24000, help="sentences without labels", positive=True)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with files.whole_directory(args.output_dir) as directory:
        texts = list(corpus(random.Random(f"{args.seed} corpus"), args.corpus_lines))
        os.mkdir(os.path.join(directory, "corpus"))
        files.write_whole(os.path.join(directory, "corpus", "part-00.txt"), "".join(f"{text}\n" for text in texts))
        for make, sizes in ((tnews, (3000, 600, 200)), (afqmc, (3000, 400, 200)), (cluewsc2020, (1500, 304, 100))):
            folder = os.path.join(directory, f"{make.__name__}_public")
            os.mkdir(folder)
            seen = set()  # a text of one split is in no other
            for split, size in zip(("train", "dev", "test"), sizes):
                rng = random.Random(f"{args.seed} {make.__name__} {split}")
                rows, before = [], set(seen)
                while len(rows) < size:
                    row = make(rng, len(rows))
                    told = json.dumps(without_label(row, None), ensure_ascii=False)
                    if told not in before:
                        rows.append(row)
                        seen.add(told)
                texts += [text for row in rows for text in data.texts_of(make.__name__, row) if text]
                if split == "test":
                    rows = [without_label(row, number) for number, row in enumerate(rows)]
                files.write_json_lines(os.path.join(folder, f"{split}.json"), rows)
        tokens = make_vocab.write(os.path.join(directory, "vocab.txt"), texts)
        files.write_whole(os.path.join(directory, data.GENERATED), "Made by demo/generate_data.py; nothing of CLUE.\n")
    print(f"{args.output_dir}: TNEWS, AFQMC, CLUEWSC2020, {args.corpus_lines} lines of corpus, {tokens} tokens")


if __name__ == "__main__":
    cli.run(main)
